"""No attack: the clean images, as the control of every other row."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robusttrain.attacks import NoThreat
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
