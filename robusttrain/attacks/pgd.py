"""Projected gradient descent on the negative loss (Madry et al. 2018)."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from robusttrain import ranges
from robusttrain.attacks.base import Surrogate
from robusttrain.attacks.objectives import ObjectiveAttack
from robusttrain.attacks.search_state import Best, Rows, standing
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


@dataclass
class PGD(ObjectiveAttack):
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

    steps: int = 10
    step_size: float | None = None
    random_start: bool = True
    start: Start = Start.uniform
    restarts: int = 1
    keep_best: bool = False
    stop_early: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.at_least(1, steps=self.steps, restarts=self.restarts)
        ranges.require(
            self.random_start or self.restarts == 1,
            "restarts",
            self.restarts,
            "1 when random_start=false: all restarts would be the same search",
        )
        ranges.one_of(list(Start), start=self.start)
        self.start = Start(self.start)
        ranges.require(
            self.random_start or self.start is Start.uniform,
            "start",
            self.start,
            "left out when random_start=false",
        )
        if self.step_size is not None:
            ranges.above(0, step_size=self.step_size)

    def search(self, surrogate: Surrogate, x: Tensor, generator: torch.Generator) -> Tensor:
        """The last iterate, or the best one of all searches."""
        surrogates = self.surrogates(surrogate, x)
        if not self._scores_all:
            return self._last_iterate(surrogates[0], x, generator)
        best = Best(x)
        for aimed in (aimed for aimed in surrogates for _ in range(self.restarts)):
            # Drawn for all images, so that the draws of one do not hang on who else stands.
            walk = _Walk.at(self._start(x, generator), aimed, x).take(best.standing)
            if len(walk.rows):
                self._climb(walk, best)
        return best.x_adv

    @property
    def _scores_all(self) -> bool:
        searches_once = self.restarts == 1 and self.targets is None
        return self.keep_best or self.stop_early or not searches_once

    @property
    def _step(self) -> float:
        return 2.5 * self.eps / self.steps if self.step_size is None else self.step_size

    def _slope(self, gradient: Tensor, before: Tensor) -> Tensor:
        """What a step ascends: the gradient; `before` is what the last step did, 0 at first."""
        return gradient

    def _start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return STARTS[self.start](self.ball, x, generator) if self.random_start else x

    def _last_iterate(self, surrogate: Surrogate, x: Tensor, generator: torch.Generator) -> Tensor:
        x_adv, slope = self._start(x, generator), torch.zeros_like(x)
        for _ in range(self.steps):
            slope = self._slope(surrogate.evaluate(x_adv).gradient, slope)
            x_adv = self.ball.project(x_adv + self._step * self.ball.ascent(slope, x_adv), x)
        return x_adv

    def _climb(self, walk: "_Walk", best: Best) -> None:
        for _ in range(self.steps):
            seen = walk.surrogate.evaluate(walk.x_adv)
            fooled = walk.surrogate.succeeded(seen.logits)
            best.offer(walk.rows, walk.x_adv, seen.value, fooled)
            walk.stand_at(self._slope(seen.gradient, walk.slope), seen.usable)
            if self.stop_early:
                walk = walk.take(standing(fooled))
            if len(walk.rows) == 0:
                return
            step = self._step * walk.share * self.ball.ascent(walk.slope, walk.x_adv)
            walk.x_adv = self.ball.project(walk.x_adv + step, walk.x)
        value, logits = walk.surrogate.score(walk.x_adv)
        best.offer(walk.rows, walk.x_adv, value, walk.surrogate.succeeded(logits))


@dataclass
class _Walk(Rows):
    """A search under way.

    `x_safe` is the last point that had a usable gradient and `slope` what was ascended from there,
    `share` (N, 1, ...) is what is left of the step length.
    """

    rows: Tensor
    surrogate: Surrogate
    x: Tensor
    x_adv: Tensor
    x_safe: Tensor
    slope: Tensor
    share: Tensor

    @classmethod
    def at(cls, start: Tensor, surrogate: Surrogate, x: Tensor) -> "_Walk":
        rows = torch.arange(len(x), device=x.device)
        share = per_image(torch.ones(len(x), dtype=x.dtype, device=x.device), x)
        return cls(rows, surrogate, x, start, x, torch.zeros_like(x), share)

    def stand_at(self, slope: Tensor, usable: Tensor) -> None:
        """Go on from here or, with half the step, from the last point with a usable gradient."""
        here = per_image(usable, slope)
        self.x_adv = self.x_safe = torch.where(here, self.x_adv, self.x_safe)
        self.slope = torch.where(here, slope, self.slope)
        self.share = torch.where(here, self.share, self.share / 2)
