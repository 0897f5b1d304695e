"""A defense of your own, in your own package: train with it from Python and from the shell.

python examples/your_defense.py
robusttrain 'defense._target_=your_defense.Pull' +defense.weight=2   # in the folder examples/
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import robusttrain as rt
from robusttrain.attacks import Attack, Loss
from robusttrain.defenses import Objective


@dataclass
class Pull:
    """min E[ L(f(x'), y) + weight |f(x') - f(x)|^2 ], where x' is the result of the attack."""

    attack: Attack = field(default_factory=rt.attacks.PGD)
    weight: float = 0.5

    def inner(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator
    ) -> Tensor:
        """Adversarial images."""
        return self.attack(model, x, y, generator=generator)

    def outer(
        self, model: nn.Module, x: Tensor, found: Tensor, y: Tensor, *, loss: Loss
    ) -> Objective:
        """The loss at the adversarial images, and the pull towards the clean logits."""
        clean, adversarial = model(x), model(found)
        pull = (adversarial - clean).square().sum(1)
        mixture = loss(adversarial, y) + self.weight * pull
        return Objective(mixture.mean(), clean=clean, adversarial=adversarial)


def main() -> None:
    """Train with it on random images of four classes."""
    torch.manual_seed(0)
    y = torch.arange(400) % 4
    x = (0.5 + 0.2 * torch.randn(4, 1, 6, 6)[y] + 0.1 * torch.randn(400, 1, 6, 6)).clamp(0, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 4))
    for epoch in rt.train(model, x, y, defense=Pull(rt.attacks.PGD(steps=3)), eps=0.05, epochs=3):
        print(f"epoch {epoch.epoch}: loss {epoch.loss:.3f}")


if __name__ == "__main__":
    main()
