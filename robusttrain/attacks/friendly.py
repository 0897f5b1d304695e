"""PGD that goes no further than it takes to fool (friendly adversarial training)."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from robusttrain import ranges
from robusttrain.attacks import Traits
from robusttrain.attacks.ascent import Friendly, Walk, climb
from robusttrain.attacks.attack_loss import AttackLoss
from robusttrain.attacks.ball_attack import BallAttack, check_step_size
from robusttrain.attacks.objectives import (
    AttackObjective,
    checked_objective,
    climbed,
    fitted_objective,
    has_own_objective,
)
from robusttrain.attacks.pgd import STARTS, Start, checked_start, projected_step


@dataclass
class FriendlyPGD(BallAttack):
    """PGD whose search for an image ends `tau` steps after it was first fooled.

    Zhang et al. 2020 ("Attacks which do not kill training make adversarial learning stronger",
    Algorithm 1): training on the least adversarial of the points that fool costs less accuracy on
    clean images. An iterate that fools uses up one of the `tau` further steps; without any left,
    the image stays where it is. An image that is never fooled ends at the last iterate of PGD. At
    most `steps` forward and `steps` backward passes, of the images whose search has not ended.

    Parameters
    ----------
    objective
        What to maximise: loss, margin or dlr.
    steps
        Gradient steps, 1 or more.
    step_size
        Length of a step in the norm, in pixel units; 2.5 * eps / steps where not given.
    random_start
        Start from a random point of S(x) instead of x.
    start
        How that point is drawn: see `Start` of PGD.
    tau
        Further steps of an image that fools the model, 0 or more; from `steps` on this is PGD.
    """

    objective: AttackObjective = AttackObjective.loss
    steps: int = 10
    step_size: float | None = None
    random_start: bool = True
    start: Start = Start.uniform
    tau: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective = checked_objective(self.objective)
        self.start = checked_start(self.random_start, self.start)
        ranges.at_least(1, steps=self.steps)
        check_step_size(self.norm, self.step_size)
        ranges.at_least(0, tau=self.tau)

    def with_steps(self, steps: int, step_size: float | None = None) -> Self:
        """A copy with so many steps of such a length."""
        return replace(self, steps=steps, step_size=step_size)

    def fitted(self, num_classes: int) -> Self:
        """The margin where there are too few classes for the DLR."""
        return replace(self, objective=fitted_objective(self.objective, None, num_classes))

    @property
    def traits(self) -> Traits:
        """What kind of an attack it is."""
        own = has_own_objective(self.objective, None)
        return replace(super().traits, starts_at_image=not self.random_start, own_objective=own)

    def search(self, surrogate: AttackLoss, x: Tensor, generator: torch.Generator) -> Tensor:
        """Where the search for each image ended."""
        start = STARTS[self.start](self.ball, x, generator) if self.random_start else x
        (aimed,) = climbed(surrogate, x, None, self.objective)
        rows = torch.arange(len(x), device=x.device)
        stop = Friendly(torch.empty_like(x), rows, torch.full_like(rows, self.tau))
        rule = projected_step(self.ball, self.steps, self.step_size)
        climb(Walk.at(start, aimed, x), self.steps, rule, stop)
        return stop.ends
