"""No attack: the clean images, as the control of every other row."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.attacks import NoThreat, parts
from robusttrain.attacks.attack_loss import Loss, cross_entropy


@dataclass
class NoAttack(NoThreat):
    """Returns the images as they are."""

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        loss: Loss = cross_entropy,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`x`, unchanged."""
        return x


def is_none(component: object) -> bool:
    """Whether an attack, or that of a defense, leaves images as they are."""
    return isinstance(parts(component)[-1], NoAttack)


def refuse_none(attack: object) -> None:
    """Raise `InputError` if `attack` leaves images as they are.

    A defense whose method is an attack would train on clean images under its name.
    """
    allowed = "one that moves away from the image: without an attack it is another method"
    ranges.require(not is_none(attack), "attack", "none", allowed)
