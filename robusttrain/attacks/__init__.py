"""Attacks: searches for the worst point of S(x), the inner maximisation.

An attack is called as `attack(model, x, y, loss=..., generator=...)` with images x of shape
(N, C, H, W) in [0, 1] and labels y of shape (N,), and returns x_adv in S(x), of the shape, dtype
and device of x. It keeps no model, leaves modes, parameters, BatchNorm statistics and the global
random state as they were, and draws only from `generator`. (Crafting in train mode runs the model's
own dropout, which draws from the global stream.)
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from robusttrain.attacks.base import Loss, cross_entropy


class Attack(Protocol):
    """What every attack can be called as."""

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        loss: Loss = cross_entropy,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Adversarial images for `x`."""


__all__ = ["Attack", "Loss", "cross_entropy"]
