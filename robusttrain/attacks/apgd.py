"""Auto-PGD, the parameter-free attack of AutoAttack (Croce and Hein 2020, 2021)."""

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol, Self

import torch
from torch import Tensor

from robusttrain import ranges
from robusttrain.attacks import StepsField, Traits
from robusttrain.attacks.attack_loss import AttackLoss
from robusttrain.attacks.ball_attack import BallAttack
from robusttrain.attacks.objectives import (
    AttackObjective,
    check_targets,
    checked_objective,
    climbed,
    fitted_objective,
    fitted_targets,
    has_own_objective,
    remaining,
)
from robusttrain.attacks.search_state import BestPoints, PerImageState, remaining_indices
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import Ball, ball, per_image, striped_start

# Croce and Hein 2020: share of the old move in a step, and when the step is reviewed.
MOMENTUM = 0.25
FIRST_REVIEW, REVIEW_SHRINKS, LEAST_REVIEW = 0.22, 0.03, 0.06

# A search that comes from outside: sizes of the balls, in radii, and the share of the steps that
# the last one gets; the others divide the rest. That of l1 is Croce and Hein 2021, section 3.
L1_BALLS, OUTER_BALLS = (3.0, 2.0, 1.0), (8.0, 4.0, 2.0, 1.0)
LAST_SHARE = 0.4

# Croce and Hein 2021, section 3: steps that get sparser.
L1_REVIEW, L1_SPARSER, L1_SHRINK, L1_LEAST_STEP = 0.04, 0.95, 1.5, 0.1

L1_RESTARTS = 5

# An image is given up where its nearest search is this many standard deviations of them all away
# from success, but not before three searches.
HOPELESS, LEAST_SEARCHES = 3.0, 3

# Length of the first step, in radii.
FIRST_STEP = {Norm.linf: 2.0, Norm.l2: 2.0, Norm.l1: 1.0}


class SearchStart(StrEnum):
    """Where a search starts.

    `random` is a random point of the ball. `stripes` is where the Square Attack starts, vertical
    stripes at the edge of the ball, one sign a column and channel. `outside` leads through balls of
    8, 4 and 2 radii, each from the best point of the one before: it gets past gradients that lead
    nowhere near the image. In l1 every search comes from outside.
    """

    random = "random"
    stripes = "stripes"
    outside = "outside"


@dataclass
class APGD(StepsField, BallAttack):
    """PGD with momentum whose step halves where it stops paying (Croce and Hein 2020, Algorithm 1).

    z = project(x_t + s * steepest(g_t)); x_{t+1} = project(x_t + 0.75 (z - x_t) + 0.25
    (x_t - x_{t-1})), from s = 2 eps on. At checkpoints that come closer together, s halves and the
    search returns to its best point where no more than `rho` of the steps raised the objective, or
    where neither step nor best value changed since the last checkpoint.

    In l1 (Croce and Hein 2021, Algorithm 1) steps are sparse, as sparse as the best point is, and
    have no momentum; the first 30 % of the steps search the ball of 3 eps, the next 30 % that of
    2 eps. The same idea, with the rule of the other norms, is the start `outside`.

    With `targets` every target has its search (APGD-T). An image is done with once it is fooled.
    A search takes `steps` + 1 forward and backward passes an image, and one for each larger ball.

    Parameters
    ----------
    targets
        How many classes to aim at, in the order of their logits at the clean image; where not
        given, the attack just leads away from the label.
    objective
        What to maximise: loss, margin or dlr.
    steps
        Steps a search, 1 or more.
    restarts
        Searches from random points for each target, 1 or more; where not given, those of
        AutoAttack: 1, and 5 in l1 without targets.
    rho
        Share of the steps that have to raise the objective, in ]0, 1[.
    starts
        Where searches start, in turn: random, stripes or outside.
    give_up
        Whether an image is given up, from the third search on, where the margins that its searches
        leave are so alike that none is likely to succeed: the smallest is above 3 standard
        deviations. The margin is relative to the spread of the logits, as in the DLR loss.
    far
        Such a margin above which an image is given up after its first search; null for none.
    """

    targets: int | None = None
    objective: AttackObjective = AttackObjective.loss
    steps: int = 100
    restarts: int | None = None
    rho: float = 0.75
    starts: list[SearchStart] = field(default_factory=lambda: [SearchStart.random])
    give_up: bool = False
    far: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_targets(self.targets, self.label)
        self.objective = checked_objective(self.objective)
        ranges.at_least(1, steps=self.steps)
        if self.restarts is None:
            self.restarts = L1_RESTARTS if self.norm is Norm.l1 and self.targets is None else 1
        ranges.at_least(1, restarts=self.restarts)
        ranges.inside(0, 1, rho=self.rho)
        ranges.require(len(self.starts) > 0, "starts", self.starts, "one start or more")
        for start in self.starts:
            ranges.one_of(list(SearchStart), starts=start)
        self.starts = [SearchStart(start) for start in self.starts]
        if self.far is not None:
            ranges.at_least(0, far=self.far)

    @property
    def traits(self) -> Traits:
        """What kind of an attack it is."""
        own = has_own_objective(self.objective, self.targets)
        return replace(super().traits, own_objective=own)

    def unused(self) -> dict[str, str]:
        """`rho` in l1, and what ends later searches if there are none."""
        searches = (self.restarts or 1) * (self.targets or 1)
        found = {"rho": "norm"} if self.norm is Norm.l1 else {}
        if searches < LEAST_SEARCHES:
            found["give_up"] = "restarts"
        if searches == 1:
            found["far"] = "restarts"
        return found

    def fitted(self, num_classes: int) -> Self:
        """No more targets than other classes; the margin where there are too few for the DLR."""
        return replace(
            self,
            targets=fitted_targets(self.targets, num_classes),
            objective=fitted_objective(self.objective, self.targets, num_classes),
        )

    def search(self, surrogate: AttackLoss, x: Tensor, generator: torch.Generator) -> Tensor:
        """The first point that fools the model, or the one of highest value."""
        best = BestPoints(x)
        aimed_at = climbed(surrogate, x, self.targets, self.objective)
        searches = [aim for aim in aimed_at for _ in range(self.restarts or 1)]
        margins = torch.full((len(searches), len(x)), torch.nan, dtype=x.dtype, device=x.device)
        given_up = torch.zeros_like(best.fooled)
        for number, aimed in enumerate(searches):
            start = self.starts[number % len(self.starts)]
            # For all images: a start must not depend on which other images remain.
            points = self._points(start, x, generator)
            rows = remaining_indices(best.fooled | given_up)
            if len(rows) == 0:
                break
            found = self._run(aimed.take(rows), x[rows], start, points[rows])
            best.offer(rows, found.x_adv, found.value, found.fooled)
            if self.give_up or self.far is not None:
                margins[number, rows] = remaining(surrogate.take(rows), found.x_adv)
                given_up |= self._hopeless(margins[: number + 1])
        return best.x_adv

    def _hopeless(self, margins: Tensor) -> Tensor:
        """Whether no more searches are worth their passes, by those that were left, (S, N)."""
        nearest = margins.amin(0)
        hopeless = torch.zeros_like(nearest, dtype=torch.bool)
        if self.far is not None:
            hopeless |= nearest > self.far
        if self.give_up and len(margins) >= LEAST_SEARCHES:
            hopeless |= nearest > HOPELESS * margins.std(0)
        return hopeless

    def _stages(self, start: SearchStart) -> list[tuple[float, int]]:
        """(radius, steps) of the balls that a search goes through."""
        sizes = L1_BALLS if self.norm is Norm.l1 else OUTER_BALLS
        if self.norm is not Norm.l1 and start is not SearchStart.outside:
            return [(self.eps, self.steps)]
        each = math.ceil((1 - LAST_SHARE) / (len(sizes) - 1) * self.steps)
        before = [(size * self.eps, each) for size in sizes[:-1]]
        return [*before, (self.eps, max(1, self.steps - each * len(before)))]

    def _run(
        self, surrogate: AttackLoss, x: Tensor, start: SearchStart, points: Tensor
    ) -> BestPoints:
        """The best points of one search from `points`."""
        found = BestPoints(x)
        subject = _Subject(torch.arange(len(x), device=x.device), surrogate, x)
        *before, (_, last_steps) = self._stages(start)
        for radius, steps in before:
            larger = ball(Threat(self.norm, radius))
            points = self._climb(larger, steps, subject, larger.project(points, x)).best_x
        self._climb(self.ball, last_steps, subject, self.ball.project(points, x), found)
        return found

    def _points(self, start: SearchStart, x: Tensor, generator: torch.Generator) -> Tensor:
        """Where a search starts, an image each."""
        if start is SearchStart.stripes:
            return striped_start(self.ball, x, generator)
        radius, _ = self._stages(start)[0]
        return RULES[self.norm].start(ball(Threat(self.norm, radius)), x, generator)

    def _climb(
        self,
        ball: Ball,
        steps: int,
        subject: "_Subject",
        start: Tensor,
        best: BestPoints | None = None,
    ) -> "_State":
        """Climb within `ball`; with `best`, report every point and drop images that are fooled."""
        rule: _Rule = RULES[self.norm](ball, steps, self.rho)
        state = _State.at(subject, start, FIRST_STEP[self.norm] * ball.eps).scored(best)
        reviews = rule.reviews()
        for step in range(1, steps + 1):
            if len(state.rows) == 0:
                break
            state.previous, state.x_adv = state.x_adv, rule.move(state, step)
            state.look()
            state = state.scored(best)
            if step in reviews:
                rule.review(state, reviews[step])
        return state


@dataclass
class _Subject:
    """The images of a search: their positions among all, what to climb, and themselves."""

    rows: Tensor
    surrogate: AttackLoss
    x: Tensor


@dataclass
class _State(PerImageState):
    """A search under way: the last two points, the best one, and what the next review needs."""

    rows: Tensor
    surrogate: AttackLoss
    x: Tensor
    x_adv: Tensor
    previous: Tensor
    gradient: Tensor
    value: Tensor
    fooled: Tensor
    best_x: Tensor
    best_gradient: Tensor
    best_value: Tensor
    step_size: Tensor
    rises: Tensor
    reviewed_value: Tensor
    halved: Tensor
    changed: Tensor
    count: Tensor

    @classmethod
    def at(cls, subject: _Subject, start: Tensor, step_size: float) -> "_State":
        seen = subject.surrogate.evaluate(start)
        fooled = subject.surrogate.succeeded(seen.logits)
        ones = torch.ones_like(seen.value)
        # A start without a usable gradient is worth nothing: the first step starts at the image.
        shown = seen.usable | fooled
        start = torch.where(per_image(shown, start), start, subject.x)
        value = torch.where(shown, _comparable(seen.value), -torch.inf)
        changed = _changed(start, subject.x)
        return cls(
            rows=subject.rows, surrogate=subject.surrogate, x=subject.x, x_adv=start,
            previous=start, gradient=seen.gradient, value=value,
            fooled=fooled,
            best_x=start.clone(), best_gradient=seen.gradient.clone(), best_value=value.clone(),
            step_size=ones * step_size, rises=0 * ones, reviewed_value=value.clone(),
            halved=ones < 0, changed=changed, count=changed / L1_SHRINK,
        )  # fmt: skip

    def look(self) -> None:
        """Evaluate the new point; where it has no usable gradient, return to the best one."""
        seen = self.surrogate.evaluate(self.x_adv)
        value = _comparable(seen.value)
        self.fooled = self.surrogate.succeeded(seen.logits)
        self.rises = self.rises + (value > self.value)
        better = (value > self.best_value).nonzero().squeeze(1)
        self.best_x[better] = self.x_adv[better]
        self.best_gradient[better] = seen.gradient[better]
        self.best_value[better] = value[better]
        self.value, self.gradient = value, seen.gradient
        # A fooled image keeps its point, whatever its gradient is.
        lost = ~seen.usable & ~self.fooled
        self.return_to_best(lost)
        self.step_size = torch.where(lost, self.step_size / 2, self.step_size)

    def return_to_best(self, lost: Tensor) -> None:
        """Continue from the best point where `lost` (N,) holds."""
        rows = lost.nonzero().squeeze(1)
        self.x_adv[rows] = self.best_x[rows]
        self.gradient[rows] = self.best_gradient[rows]

    def scored(self, best: BestPoints | None) -> "_State":
        """Report the points to `best`; returns the state of those that are not fooled."""
        if best is None:
            return self
        best.offer(self.rows, self.x_adv, self.value, self.fooled)
        return self.take(remaining_indices(self.fooled)) if bool(self.fooled.any()) else self


class _Rule(Protocol):
    """Where a search starts, how far a step goes, and in how many pixels."""

    @staticmethod
    def start(ball: Ball, x: Tensor, generator: torch.Generator) -> Tensor:
        """A random point of `ball` around each image, cut with the box."""

    def reviews(self) -> dict[int, int]:
        """Steps after which the step is reviewed, and how many steps each of them looks back."""

    def move(self, state: _State, step: int) -> Tensor:
        """The next point."""

    def review(self, state: _State, since: int) -> None:
        """Set the step, in place, after `since` more steps."""


@dataclass(frozen=True)
class _Halving:
    """Croce and Hein 2020: halve where too few steps pay, conditions 1 and 2 of section 3."""

    ball: Ball
    steps: int
    rho: float

    @staticmethod
    def start(ball: Ball, x: Tensor, generator: torch.Generator) -> Tensor:
        return ball.random_start(x, generator)

    def reviews(self) -> dict[int, int]:
        first, shrink, least = (
            max(1, int(share * self.steps))
            for share in (FIRST_REVIEW, REVIEW_SHRINKS, LEAST_REVIEW)
        )
        step, since, found = first, first, {}
        while step <= self.steps:
            found[step] = since
            since = max(since - shrink, least)
            step += since
        return found

    def move(self, state: _State, step: int) -> Tensor:
        ascent = self.ball.ascent(state.gradient, state.x_adv)
        size = per_image(state.step_size, state.x)
        there = self.ball.project(state.x_adv + size * ascent, state.x)
        if step == 1:
            return there
        onwards = (1 - MOMENTUM) * (there - state.x_adv)
        inertia = MOMENTUM * (state.x_adv - state.previous)
        return self.ball.project(state.x_adv + onwards + inertia, state.x)

    def review(self, state: _State, since: int) -> None:
        stuck = ~state.halved & (state.reviewed_value >= state.best_value)
        state.halved = (state.rises <= self.rho * since) | stuck
        state.step_size = torch.where(state.halved, state.step_size / 2, state.step_size)
        state.reviewed_value = state.best_value.clone()
        state.rises = torch.zeros_like(state.rises)
        state.return_to_best(state.halved)


@dataclass(frozen=True)
class _Sparse:
    """Croce and Hein 2021: move fewer pixels at a time as the best point gets sparser."""

    ball: Ball
    steps: int
    rho: float

    @staticmethod
    def start(ball: Ball, x: Tensor, generator: torch.Generator) -> Tensor:
        # Projected from far outside, few pixels are left. A point drawn uniformly from the ball
        # changes all of them a little, and the search never gets sparse.
        noise = torch.empty_like(x).normal_(generator=generator)
        return ball.project(x + noise, x)

    def reviews(self) -> dict[int, int]:
        since = max(1, int(L1_REVIEW * self.steps))
        return dict.fromkeys(range(since, self.steps + 1, since), since)

    def move(self, state: _State, step: int) -> Tensor:
        ascent = self.ball.sparse_ascent(state.gradient, state.x_adv, state.count)
        size = per_image(state.step_size, state.x)
        return self.ball.project(state.x_adv + size * ascent, state.x)

    def review(self, state: _State, since: int) -> None:
        changed = _changed(state.best_x, state.x)
        sparser = changed < L1_SPARSER * state.changed
        smaller = (state.step_size / L1_SHRINK).clamp_min(L1_LEAST_STEP * self.ball.eps)
        state.step_size = torch.where(sparser, self.ball.eps, smaller)
        state.changed, state.count = changed, changed / L1_SHRINK
        state.return_to_best(sparser)


def _changed(x_adv: Tensor, x: Tensor) -> Tensor:
    """How many pixels of each image differ, (N,)."""
    return (x_adv != x).flatten(1).sum(1).to(x.dtype)


def _comparable(value: Tensor) -> Tensor:
    """Map NaN to -inf, so that values compare."""
    return value.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


RULES: dict[Norm, type[_Halving] | type[_Sparse]] = {
    Norm.linf: _Halving,
    Norm.l2: _Halving,
    Norm.l1: _Sparse,
}
