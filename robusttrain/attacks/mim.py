"""Momentum iterative FGSM, whose examples transfer better than those of PGD (Dong et al. 2018)."""

from dataclasses import dataclass

from robusttrain import ranges
from robusttrain.attacks.ascent import MomentumStep, StepRule
from robusttrain.attacks.pgd import PGD


@dataclass
class MIM(PGD):
    """PGD along g_{t+1} = decay * g_t + grad_x L / |grad_x L|_1 (Dong et al. 2018, eq. 6 and 7).

    The momentum keeps the search out of narrow maxima, which other models do not share. It starts
    at x, with steps that reach the edge of the ball in a straight line; both can be set otherwise,
    and so can all that PGD knows.

    Parameters
    ----------
    step_size
        Length of a step in the norm, in pixel units; eps / steps where not given.
    random_start
        Start from a random point of S(x) instead of x.
    decay
        Share of the momentum that is left after a step, 0 or more; 0 is PGD.
    """

    random_start: bool = False
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.at_least(0, decay=self.decay)

    @property
    def step_rule(self) -> StepRule:
        """The step of PGD, along the momentum."""
        default = self.eps / self.steps
        length = default if self.step_size is None else self.step_size
        return MomentumStep(self.ball, length, self.decay)
