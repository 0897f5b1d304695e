"""Adversarial training on a mixture of clean and adversarial images."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.attacks import Attack, Loss
from robusttrain.attacks.none import refuse_none
from robusttrain.defenses import Objective


@dataclass
class AlphaMix:
    """min E[ alpha L(f(x), y) + (1 - alpha) L(f(adv(x)), y) ].

    Szegedy et al. 2014 train on such a mixture with L-BFGS examples; Goodfellow, Shlens and Szegedy
    2015 (section 6) make it practical with FGSM and alpha = 0.5. The adversarial images are
    constants of the outer gradient. Two forward passes and one backward pass through both, besides
    the passes of the attack.

    Parameters
    ----------
    attack
        Any attack but none.
    alpha
        Weight of the clean loss, strictly between 0 and 1.
    """

    attack: Attack
    alpha: float = 0.5

    def __post_init__(self) -> None:
        ranges.inside(0, 1, alpha=self.alpha)
        refuse_none(self.attack)

    def inner(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator
    ) -> Tensor:
        """Adversarial images."""
        return self.attack(model, x, y, generator=generator)

    def outer(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, loss: Loss
    ) -> Objective:
        """The mixture of the clean and the adversarial loss."""
        clean, adversarial = model(x), model(x_adv)
        mixture = self.alpha * loss(clean, y) + (1 - self.alpha) * loss(adversarial, y)
        return Objective(mixture.mean(), clean=clean, adversarial=adversarial)
