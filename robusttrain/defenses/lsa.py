"""Learning with a Strong Adversary (Huang et al. 2016)."""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from robusttrain.attacks import Loss, ThreatFields
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.softmax_linearisation import SoftmaxLinearisation
from robusttrain.defenses import Objective
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.threat import Norm


class Direction(StrEnum):
    """The function that the adversary linearises: the loss, or the softmax outputs (alpha)."""

    loss = "loss"
    alpha = "alpha"


@dataclass
class LSA(ThreatFields):
    """min E[ max_{|r| <= eps} L(f(x + r), y) ], r from a linearisation (Huang et al. 2016, eq. 1).

    `direction=loss` takes the maximiser of the linearised loss (section 3.2): eps g/|g|_2 in l2,
    eps sign(g) in linf, the pixel of largest gradient in l1. `direction=alpha` is Algorithm 1: the
    shortest step to another class by the Jacobian of the softmax outputs, scaled to length `eps`.
    It costs a backward pass for each class.

    Parameters
    ----------
    norm, eps
        The threat model; `eps` in pixel units of [0, 1], 0 or more.
    direction
        The function that the adversary linearises: the loss, or the softmax outputs (alpha).
    """

    norm: Norm = Norm.l2
    eps: float = 0.5
    direction: Direction = Direction.loss

    def __post_init__(self) -> None:
        attacks = {Direction.loss: FGSM, Direction.alpha: SoftmaxLinearisation}
        self._worst_case = WorstCase(attacks[self.direction](norm=self.norm, eps=self.eps))

    def inner(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator
    ) -> Tensor:
        """The perturbed images x + r."""
        return self._worst_case.inner(model, x, y, generator=generator)

    def outer(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, loss: Loss
    ) -> Objective:
        """The loss at the perturbed images."""
        return self._worst_case.outer(model, x, x_adv, y, loss=loss)
