"""Projected gradient descent on the negative loss (Madry et al. 2018)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Self

import torch
from torch import Tensor

from robusttrain import ranges
from robusttrain.attacks import Traits
from robusttrain.attacks.ascent import AllSteps, ProjectedStep, Scored, StepRule, Walk, climb
from robusttrain.attacks.attack_loss import AttackLoss
from robusttrain.attacks.ball_attack import BallAttack, check_step_size
from robusttrain.attacks.objectives import (
    AttackObjective,
    check_targets,
    checked_objective,
    climbed,
    fitted_objective,
    fitted_targets,
    has_own_objective,
)
from robusttrain.attacks.search_state import BestPoints
from robusttrain.threat.balls import Ball, per_image, striped_start

# Standard deviation of a start next to the image, in pixel units (Zhang et al. 2019).
NEARBY = 0.001


class Start(StrEnum):
    """How a random start is drawn.

    `uniform` is a point of all of S(x), `gaussian` one right next to x, with a standard deviation
    of 0.001, which is all that a loss without slope at x needs (TRADES, Zhang et al. 2019).
    `stripes` is where the Square Attack starts, at the edge of S(x). `mixed` is uniform or stripes,
    with even odds for each image: a network that is trained from random points alone can learn to
    hide what lies behind the stripes from its gradient.
    """

    uniform = "uniform"
    gaussian = "gaussian"
    stripes = "stripes"
    mixed = "mixed"


def _nearby(ball: Ball, x: Tensor, generator: torch.Generator) -> Tensor:
    return ball.project(x + torch.empty_like(x).normal_(0, NEARBY, generator=generator), x)


def _mixed(ball: Ball, x: Tensor, generator: torch.Generator) -> Tensor:
    anywhere, striped = ball.random_start(x, generator), striped_start(ball, x, generator)
    odds = torch.rand(len(x), generator=generator, device=x.device)
    return torch.where(per_image(odds < 0.5, x), anywhere, striped)


STARTS: dict[Start, Callable[[Ball, Tensor, torch.Generator], Tensor]] = {
    Start.uniform: lambda ball, x, generator: ball.random_start(x, generator),
    Start.gaussian: _nearby,
    Start.stripes: striped_start,
    Start.mixed: _mixed,
}


def projected_step(ball: Ball, steps: int, step_size: float | None) -> ProjectedStep:
    """The step of PGD, of length 2.5 * eps / steps where none is given."""
    return ProjectedStep(ball, 2.5 * ball.eps / steps if step_size is None else step_size)


def checked_start(random_start: bool, start: str) -> Start:
    """The start that a word, or itself, stands for; `InputError` if it is not to be had."""
    ranges.one_of(list(Start), start=start)
    allowed = "left out when random_start=false"
    ranges.require(random_start or start == Start.uniform, "start", start, allowed)
    return Start(start)


@dataclass
class PGD(BallAttack):
    """x_{t+1} = project(x_t + step_size * steepest(grad_x L(f(x_t), y))), Madry et al. 2018, eq. 2.

    With one restart, no targets and without `keep_best` it costs `steps` forward and `steps`
    backward passes and returns the last iterate, as training wants it. Otherwise every iterate is
    scored, the last one of each search by one more forward pass: an image keeps the iterate of
    highest value among those that fool the model, or else among all, and takes no part in later
    searches once it is fooled.

    With `targets` and `objective=margin` it is the multi-targeted attack of Gowal et al. 2019. In
    l1 a step moves 1 % of the pixels (SLIDE, Tramer and Boneh 2019), and the projection is exact
    for the intersection of ball and box (Croce and Hein 2021).

    Parameters
    ----------
    targets
        How many classes to aim at, in the order of their logits at the clean image; where not
        given, the attack just leads away from the label.
    objective
        What to maximise: loss, margin or dlr.
    steps
        Gradient steps a search, 1 or more.
    step_size
        Length of a step in the norm, in pixel units; 2.5 * eps / steps where not given.
    random_start
        Start from a random point of S(x) instead of x.
    start
        How that point is drawn: `uniform`, `gaussian`, `stripes` or `mixed`; see `Start`.
    restarts
        Independent searches for each target, 1 or more.
    keep_best
        Score every iterate, also in a single search.
    stop_early
        Keep the first iterate that fools the model and spend nothing on the image from then on:
        for evaluation, where one success is enough, while training wants the worst point.
    """

    targets: int | None = None
    objective: AttackObjective = AttackObjective.loss
    steps: int = 10
    step_size: float | None = None
    random_start: bool = True
    start: Start = Start.uniform
    restarts: int = 1
    keep_best: bool = False
    stop_early: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_targets(self.targets, self.label)
        self.objective = checked_objective(self.objective)
        self.start = checked_start(self.random_start, self.start)
        ranges.at_least(1, steps=self.steps)
        check_step_size(self.norm, self.step_size)
        ranges.at_least(1, restarts=self.restarts)
        allowed = "1 when random_start=false: all restarts would be the same search"
        ranges.require(self.random_start or self.restarts == 1, "restarts", self.restarts, allowed)

    def with_steps(self, steps: int, step_size: float | None = None) -> Self:
        """A copy with so many steps of such a length."""
        return replace(self, steps=steps, step_size=step_size)

    def restarted(self, searches: int) -> Self:
        """A copy that searches so often, from random points."""
        return replace(self, restarts=searches, random_start=True)

    def fitted(self, num_classes: int) -> Self:
        """No more targets than other classes; the margin where there are too few for the DLR."""
        return replace(
            self,
            targets=fitted_targets(self.targets, num_classes),
            objective=fitted_objective(self.objective, self.targets, num_classes),
        )

    def unused(self) -> dict[str, str]:
        """`keep_best`, if every iterate is scored anyway."""
        if self.stop_early:
            return {"keep_best": "stop_early"}
        if self.targets is not None:
            return {"keep_best": "targets"}
        return {"keep_best": "restarts"} if self.restarts > 1 else {}

    @property
    def traits(self) -> Traits:
        """What kind of an attack it is."""
        own = has_own_objective(self.objective, self.targets)
        return replace(super().traits, starts_at_image=not self.random_start, own_objective=own)

    @property
    def step_rule(self) -> StepRule:
        """How a step leads from one point to the next."""
        return projected_step(self.ball, self.steps, self.step_size)

    def search(self, surrogate: AttackLoss, x: Tensor, generator: torch.Generator) -> Tensor:
        """The last iterate, or the best one of all searches."""
        surrogates = climbed(surrogate, x, self.targets, self.objective)
        if self._scores_all:
            return self._best(surrogates, x, generator)
        walk = Walk.at(self._start(x, generator), surrogates[0], x)
        return climb(walk, self.steps, self.step_rule, AllSteps()).x_adv

    @property
    def _scores_all(self) -> bool:
        searches_once = self.restarts == 1 and self.targets is None
        return self.keep_best or self.stop_early or not searches_once

    def _best(
        self, surrogates: Sequence[AttackLoss], x: Tensor, generator: torch.Generator
    ) -> Tensor:
        best = BestPoints(x)
        for aimed in (aimed for aimed in surrogates for _ in range(self.restarts)):
            # For all images: the draws of one must not depend on which others remain.
            start, rows = self._start(x, generator), best.remaining
            if len(rows):
                stop = Scored.start(best, rows, x[rows], stop_early=self.stop_early)
                walk = Walk.at(start[rows], aimed.take(rows), x[rows])
                climb(walk, self.steps, self.step_rule, stop)
        return best.x_adv

    def _start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return STARTS[self.start](self.ball, x, generator) if self.random_start else x
