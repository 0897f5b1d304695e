"""N-FGSM: one step from a noisy image, without projection on the ball."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.attacks import Loss, ThreatFields
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.model_view import Mode
from robusttrain.defenses import Objective
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball


@dataclass
class NFGSM(ThreatFields):
    """min E[ L(f(x + n + d), y) ], n noise of k times the radius, d the step of FGSM at x + n.

    de Jorge et al. 2022, Algorithm 1: n is uniform in the ball of radius k eps, and d maximises the
    linearised loss over the ball of radius `eps` around x + n. Both are clipped to the box, and
    neither is projected on S(x). Noise beyond the radius prevents the catastrophic overfitting of
    single-step training. Two forward and two backward passes, one of the latter only to the input.

    Parameters
    ----------
    norm, eps
        The threat model; `eps` in pixel units of [0, 1], 0 or more.
    k
        Radius of the noise in units of `eps`, 0 or more.
    mode
        Mode of the model while crafting; the paper's is train.
    """

    norm: Norm = Norm.linf
    eps: float = 8 / 255
    k: float = 2.0
    mode: Mode = Mode.eval

    def __post_init__(self) -> None:
        ranges.at_least(0, k=self.k)
        self._worst_case = WorstCase(FGSM(norm=self.norm, eps=self.eps, mode=self.mode))

    def inner(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator
    ) -> Tensor:
        """The images at the end of the step, (N, C, H, W)."""
        noisy = ball(Threat(self.norm, self.k * self.eps)).random_start(x, generator)
        return self._worst_case.inner(model, noisy, y, generator=generator)

    def outer(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, loss: Loss
    ) -> Objective:
        """The loss at the end of the step."""
        return self._worst_case.outer(model, x, x_adv, y, loss=loss)
