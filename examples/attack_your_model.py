"""Attack a model of your own: with a suite, with a single attack, and with an attack of your own.

python examples/attack_your_model.py
"""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import robusttrain as rt

EPS = 0.05


@dataclass
class Fog:
    """An attack is any function from images to images; this one mixes them with one grey value."""

    eps: float

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, loss: object = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Adversarial images: the grey value is drawn anew for each image."""
        grey = torch.rand(len(x), 1, 1, 1, generator=generator)
        return x + self.eps * (grey - x)


def main() -> None:
    """Train a network in plain torch, and attack it."""
    digits = load_digits()
    x = torch.from_numpy(digits.images / 16).float().unsqueeze(1)
    y = torch.from_numpy(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[300:]), y[300:]).backward()
        optimizer.step()

    pgd = rt.attacks.PGD(norm="l2", eps=0.5, steps=20)
    x_adv = pgd(model, x[:300], y[:300])
    print(f"{(model(x_adv).argmax(1) == y[:300]).float().mean():.1%} right after PGD in l2")

    own = {"fog": Fog(EPS)}
    print(rt.evaluate(model, x[:300], y[:300], eps=EPS, evaluation="quick", attacks=own))


if __name__ == "__main__":
    main()
