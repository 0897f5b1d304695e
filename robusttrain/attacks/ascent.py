"""The one loop of PGD, MIM, FGSM and friendly PGD.

In each step the loop takes the gradient, a stopping rule chooses the images that continue, and a
step rule moves them to their next points. An attack chooses a start and the two rules.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from robusttrain.attacks.attack_loss import AttackLoss, Gradients
from robusttrain.attacks.search_state import BestPoints, PerImageState, remaining_indices
from robusttrain.threat.balls import Ball, per_image


@dataclass
class Walk(PerImageState):
    """The images whose search continues, and their points.

    Parameters
    ----------
    surrogate
        What to climb.
    x, x_adv
        The images, and their current points, (N, ...).
    slope
        What the last step ascended, (N, ...); 0 at first.
    share
        What is left of the step length: all, or (N, 1, ...) of it.
    """

    surrogate: AttackLoss
    x: Tensor
    x_adv: Tensor
    slope: Tensor
    share: Tensor | float = 1.0

    @classmethod
    def at(cls, start: Tensor, surrogate: AttackLoss, x: Tensor) -> "Walk":
        """A walk that begins at `start`."""
        return cls(
            surrogate, x, start, torch.zeros((), dtype=x.dtype, device=x.device).expand_as(x)
        )


class StepRule(Protocol):
    """From one point to the next."""

    def slope(self, gradient: Tensor, before: Tensor) -> Tensor:
        """What to ascend, (N, ...); `before` is what the last step ascended, 0 at first."""

    def next_point(self, walk: Walk) -> Tensor:
        """The point of S(x) that a step along `walk.slope` leads to."""


class StoppingRule(Protocol):
    """Which images continue."""

    def go_on(self, walk: Walk, seen: Gradients, slope: Tensor) -> Walk:
        """The images of a walk that take one more step, along `slope`.

        `seen` has the gradients and the logits at their current points.
        """

    def end(self, walk: Walk) -> None:
        """Record the images that have taken all their steps."""


def climb(walk: Walk, steps: int, rule: StepRule, stop: StoppingRule) -> Walk:
    """The images that take all the steps, at their last points.

    A step costs one forward and one backward pass of each image that continues.
    """
    for _ in range(steps):
        seen = walk.surrogate.evaluate(walk.x_adv)
        walk = stop.go_on(walk, seen, rule.slope(seen.gradient, walk.slope))
        if len(walk.x) == 0:
            break
        walk.x_adv = rule.next_point(walk)
    stop.end(walk)
    return walk


# Step rules


@dataclass(frozen=True)
class ProjectedStep:
    """Go `length` along the gradient, and back to S(x): x_{t+1} = project(x_t + length * d).

    d is the direction in which the gradient is ascended fastest.
    """

    ball: Ball
    length: float

    def slope(self, gradient: Tensor, before: Tensor) -> Tensor:
        """The gradient."""
        return gradient

    def next_point(self, walk: Walk) -> Tensor:
        """The end of the step."""
        step = self.length * walk.share * self.ball.ascent(walk.slope, walk.x_adv)
        return self.ball.project(walk.x_adv + step, walk.x)


@dataclass(frozen=True)
class MomentumStep(ProjectedStep):
    """The same along g_{t+1} = decay * g_t + grad / |grad|_1 (Dong et al. 2018, eq. 6)."""

    decay: float

    def slope(self, gradient: Tensor, before: Tensor) -> Tensor:
        """The gradients so far, in units of their lengths, older ones with less weight."""
        length = gradient.flatten(1).abs().sum(1).clamp_min(torch.finfo(gradient.dtype).tiny)
        return self.decay * before + gradient / per_image(length, gradient)


@dataclass(frozen=True)
class LinearMaximum:
    """Go to the point of S(x) where the linearised loss is largest."""

    ball: Ball

    def slope(self, gradient: Tensor, before: Tensor) -> Tensor:
        """The gradient."""
        return gradient

    def next_point(self, walk: Walk) -> Tensor:
        """That point, which does not depend on the current one."""
        return self.ball.linear_maximiser(walk.slope, walk.x)


# Stopping rules


class AllSteps:
    """All images take all steps: the last iterate is what training wants."""

    def go_on(self, walk: Walk, seen: Gradients, slope: Tensor) -> Walk:
        """All images."""
        walk.slope = slope
        return walk

    def end(self, walk: Walk) -> None:
        """Nothing."""


@dataclass
class Scored:
    """Every point is offered to `best`, the last one at the cost of one more forward pass.

    From a point without a usable gradient the walk returns to the last point that had one, or to
    the image, and halves its step.

    Parameters
    ----------
    best
        The best points of all images.
    rows
        Positions there of the images that continue, (N,).
    x_safe
        Their last points with a usable gradient; the images at first.
    share
        What is left of the step length, (N, 1, ...).
    stop_early
        Whether an image stops once it is fooled.
    """

    best: BestPoints
    rows: Tensor
    x_safe: Tensor
    share: Tensor
    stop_early: bool

    @classmethod
    def start(cls, best: BestPoints, rows: Tensor, x: Tensor, *, stop_early: bool) -> "Scored":
        """The rule for images `x`, which are those at `rows`."""
        share = per_image(torch.ones(len(x), dtype=x.dtype, device=x.device), x)
        return cls(best, rows, x, share, stop_early)

    def go_on(self, walk: Walk, seen: Gradients, slope: Tensor) -> Walk:
        """All images, or those that are not fooled."""
        fooled = walk.surrogate.succeeded(seen.logits)
        self.best.offer(self.rows, walk.x_adv, seen.value, fooled)
        here = per_image(seen.usable, slope)
        walk.x_adv = self.x_safe = torch.where(here, walk.x_adv, self.x_safe)
        walk.slope = torch.where(here, slope, walk.slope)
        self.share = torch.where(here, self.share, self.share / 2)
        if self.stop_early:
            walk = self._among(walk, remaining_indices(fooled))
        walk.share = self.share
        return walk

    def end(self, walk: Walk) -> None:
        """Offer the last points."""
        if len(walk.x):
            value, logits = walk.surrogate.score(walk.x_adv)
            self.best.offer(self.rows, walk.x_adv, value, walk.surrogate.succeeded(logits))

    def _among(self, walk: Walk, on: Tensor) -> Walk:
        self.rows, self.x_safe, self.share = self.rows[on], self.x_safe[on], self.share[on]
        return walk.take(on)


@dataclass
class Friendly:
    """An image stops once it is fooled, after as many further fooled steps as it has to `spare`.

    Parameters
    ----------
    ends
        Where the walks of all images end.
    rows
        Positions there of the images that continue, (N,).
    spare
        Fooled steps that each of them has left, (N,).
    """

    ends: Tensor
    rows: Tensor
    spare: Tensor

    def go_on(self, walk: Walk, seen: Gradients, slope: Tensor) -> Walk:
        """The images that are not fooled, or have steps to spare."""
        fooled = walk.surrogate.succeeded(seen.logits)
        self.end(walk)
        on = remaining_indices(fooled & (self.spare == 0))
        self.rows, self.spare = self.rows[on], (self.spare - fooled.long())[on]
        walk.slope = slope
        return walk.take(on)

    def end(self, walk: Walk) -> None:
        """Keep where they are."""
        self.ends[self.rows] = walk.x_adv
