"""Threat models as values: a norm and a radius.

The computations with them are in `balls`, which needs torch; reports do not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from robusttrain import ranges
from robusttrain.errors import InputError


class Norm(StrEnum):
    """The norm that measures a perturbation of one image."""

    linf = "linf"
    l2 = "l2"
    l1 = "l1"


# The side of the box [0, 1]. No linf perturbation is larger; how large others can be depends on the
# number of pixels.
BOX_SIDE = 1.0

# Balls of the same radius, each contained in the next.
INNERMOST_FIRST = (Norm.l1, Norm.l2, Norm.linf)


def check_lengths(norm: str, **lengths: float) -> None:
    """Raise `InputError` unless all `lengths`, by their keys, are lengths of perturbations.

    These are finite, 0 or more, and in linf at most 1, the side of the box.
    """
    ranges.at_least(0, **lengths)
    for key, length in lengths.items():
        if norm == Norm.linf and length > BOX_SIDE:
            levels = f"{length:g} of 255 levels are {length:g}/255"
            problem = f"is too large for pixels in [0, 1], where {levels}"
            raise InputError(key, length, "at most 1 in linf", problem)


@dataclass(frozen=True)
class Threat:
    """A threat model: all images in the box [0, 1] within distance `eps` of x in `norm`.

    Parameters
    ----------
    norm
        The norm of a perturbation of one image.
    eps
        The radius, in pixel units of [0, 1], 0 or more.

    Raises
    ------
    InputError
        If `norm` is not a norm, or if `eps` is negative or non-finite.
    """

    norm: Norm
    eps: float

    def __post_init__(self) -> None:
        ranges.one_of(list(Norm), norm=self.norm)
        ranges.at_least(0, eps=self.eps)
        # Strings are accepted as well.
        object.__setattr__(self, "norm", Norm(self.norm))

    def __str__(self) -> str:
        """The form in messages: `linf, eps 0.03`."""
        return f"{self.norm}, eps {self.eps:.6g}"

    def at(self, eps: float) -> "Threat":
        """The same norm with another radius."""
        return Threat(self.norm, eps)

    def covers(self, other: "Threat") -> bool:
        """Whether the ball of `other` is contained in this one, by norms and radii.

        At the same radius the l1 ball lies in the l2 ball, and the l2 ball in the linf ball.
        """
        inside = INNERMOST_FIRST.index(other.norm) <= INNERMOST_FIRST.index(self.norm)
        return inside and other.eps <= self.eps


def of_radii(radii: Mapping[str, float]) -> tuple[Threat, ...]:
    """The threat models of `radii` (in pixel units) by their norms, in the same order.

    Raises
    ------
    InputError
        If a key is not a norm, or a value not a radius in it; the keys begin with `threats`.
    """
    for norm, eps in radii.items():
        key = f"threats.{norm}"
        known = norm in list(Norm)
        ranges.require(known, key, eps, f"the radius of one of {', '.join(Norm)}")
        check_lengths(norm, **{key: eps})
    return tuple(Threat(Norm(norm), eps) for norm, eps in radii.items())


def named(name: str, threat: Threat, among: int) -> str:
    """`name`, with the norm behind it where it stands for one of several threat models."""
    return f"{name}_{threat.norm}" if among > 1 else name
