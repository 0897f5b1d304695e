"""The min-max formulation; many defenses are special cases with a certain attack."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robusttrain.attacks import Attack, Loss
from robusttrain.attacks.none import refuse_none
from robusttrain.defenses import Objective


@dataclass
class WorstCase:
    """min E[ max_{z in S(x)} L(f(z), y) ] (Madry et al. 2018, eq. 2.1).

    The attack approximates the inner maximum, and its result is a constant of the outer gradient
    (Danskin's theorem). With PGD this is PGD-AT. With the maximiser of the linearised loss it is
    the alternating algorithm of Robust Training (Shaham, Yamada and Negahban 2018, Algorithm 1),
    and the first form of learning with a strong adversary (Huang et al. 2016). One forward and one
    backward pass besides the passes of the attack.

    Parameters
    ----------
    attack
        Any attack but none.
    """

    attack: Attack

    def __post_init__(self) -> None:
        refuse_none(self.attack)

    def inner(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator
    ) -> Tensor:
        """Adversarial images."""
        return self.attack(model, x, y, generator=generator)

    def outer(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, loss: Loss
    ) -> Objective:
        """The loss at the adversarial images."""
        logits = model(x_adv)
        return Objective(loss(logits, y).mean(), adversarial=logits)
