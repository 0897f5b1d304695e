"""Lines below and above an activation between bounds of its argument."""

from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Lines(NamedTuple):
    """slope z + intercept below and above an activation, each of the shape of z."""

    lower_slope: Tensor
    lower_intercept: Tensor
    upper_slope: Tensor
    upper_intercept: Tensor


class Curvature(Enum):
    """Where an increasing function is convex. Its derivative rises, then falls, in each case."""

    convex = "convex"
    concave = "concave"
    convex_then_concave = "convex for z < 0, concave for z > 0"
    rising_then_falling = "unknown"


def relu_slopes(lower: Tensor, upper: Tensor) -> Tensor:
    """The slope of the line below ReLU that leaves the smaller area: 1 or 0 (CROWN-Ada)."""
    return (upper > -lower).to(lower.dtype)


def relu_lines(lower: Tensor, upper: Tensor, slopes: Tensor) -> Lines:
    """The lines of ReLU: slope `slopes`, from 0 to 1, through 0 below, and the chord above.

    Where ReLU is linear between the bounds, both are that line.
    """
    active, inactive = lower >= 0, upper <= 0
    chord = upper / (upper - lower).clamp_min(torch.finfo(lower.dtype).tiny)
    above = torch.where(active, 1.0, torch.where(inactive, 0.0, chord))
    below = torch.where(active, 1.0, torch.where(inactive, 0.0, slopes))
    zero = torch.zeros_like(lower)
    return Lines(below, zero, above, torch.where(active | inactive, 0.0, -chord * lower))


class Shape:
    """A smooth increasing function, with lines whose slopes follow from its curvature.

    Where it is convex, the upper line is the chord and the lower one the tangent at the centre;
    where it is concave, the other way round. Otherwise both have the smaller of the derivatives at
    the ends, which no derivative in between is below, and go through the ends.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], curvature: Curvature) -> None:
        self.function, self.curvature = function, curvature

    def lines(self, lower: Tensor, upper: Tensor) -> Lines:
        """The lines between the bounds."""
        at_lower, at_upper = self.function(lower), self.function(upper)
        least = torch.minimum(self._derivative(lower), self._derivative(upper))
        parallel = Lines(least, at_lower - least * lower, least, at_upper - least * upper)
        # Of a short interval the chord is mostly rounding.
        width = upper - lower
        long = width > torch.finfo(lower.dtype).eps ** 0.5 * (1 + lower.abs())
        chord = (at_upper - at_lower) / torch.where(long, width, 1.0)
        middle = (lower + upper) / 2
        tangent = self._derivative(middle)
        one = (tangent, self.function(middle) - tangent * middle)
        other = (chord, at_lower - chord * lower)
        convex, concave = self._parts(lower, upper)
        lines = _where(convex & long, Lines(*one, *other), parallel)
        return _where(concave & long, Lines(*other, *one), lines)

    def _parts(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Where the function is known to be convex, and where to be concave."""
        no = torch.zeros_like(lower, dtype=torch.bool)
        return {
            Curvature.convex: (~no, no),
            Curvature.concave: (no, ~no),
            Curvature.convex_then_concave: (upper <= 0, lower >= 0),
            Curvature.rising_then_falling: (no, no),
        }[self.curvature]

    def _derivative(self, z: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            value: Any = self.function(leaf).sum()
        return torch.autograd.grad(value, leaf)[0]


def _where(mask: Tensor, lines: Lines, others: Lines) -> Lines:
    return Lines(*(torch.where(mask, a, b) for a, b in zip(lines, others, strict=True)))
