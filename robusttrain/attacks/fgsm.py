"""Fast gradient sign method and its random-start variant."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robusttrain import ranges
from robusttrain.attacks import Traits
from robusttrain.attacks.ascent import (
    AllSteps,
    LinearMaximum,
    ProjectedStep,
    StepRule,
    Walk,
    climb,
)
from robusttrain.attacks.attack_loss import AttackLoss
from robusttrain.attacks.ball_attack import BallAttack, check_step_size

# Wong, Rice and Kolter 2020: a longer step than the radius, cut back to it, reaches more corners.
RANDOM_START_STEP = 1.25


@dataclass
class FGSM(BallAttack):
    """One step that maximises the linearised loss over S(x).

    In linf this is x + eps * sign(grad_x L) (Goodfellow, Shlens and Szegedy 2015, section 4), in
    l2 x + eps * g / |g|_2; in l1 it moves the pixel of largest gradient, and once that is at the
    edge of the box the next one. One forward and one backward pass.

    Parameters
    ----------
    random_start
        Step from a random point of the ball, also outside the box, and project on S(x): FGSM-RS
        of Wong, Rice and Kolter 2020, Algorithm 3.
    step_size
        Length of the step after a random start, in pixel units; 1.25 * eps where not given.
    """

    random_start: bool = False
    step_size: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is not None:
            ranges.require(
                self.random_start,
                "step_size",
                self.step_size,
                "left out (null) unless random_start=true",
            )
            check_step_size(self.norm, self.step_size)

    @property
    def traits(self) -> Traits:
        """What kind of an attack it is."""
        return replace(super().traits, starts_at_image=not self.random_start)

    def search(self, surrogate: AttackLoss, x: Tensor, generator: torch.Generator) -> Tensor:
        """The end of the step."""
        walk = Walk.at(self._start(x, generator), surrogate, x)
        return climb(walk, 1, self._step_rule, AllSteps()).x_adv

    def _start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        # Not cut with the box: where images are black or white, a cut start puts half the pixels
        # back on x, and training falls to catastrophic overfitting as with plain FGSM.
        return x + self.ball.random_offset(x, generator) if self.random_start else x

    @property
    def _step_rule(self) -> StepRule:
        if not self.random_start:
            return LinearMaximum(self.ball)
        default = RANDOM_START_STEP * self.eps
        return ProjectedStep(self.ball, default if self.step_size is None else self.step_size)
