"""What attacks and defenses of several threat models share."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self, cast

from robusttrain import ranges
from robusttrain.attacks import Attack, several_threats, states_threat, under
from robusttrain.attacks.none import refuse_none
from robusttrain.errors import InputError
from robusttrain.threat import INNERMOST_FIRST, Threat, of_radii


class SeveralNorms:
    """Base of a dataclass whose field `threats` has radii by norms: it is `MultiBounded`."""

    threats: Mapping[str, float]

    def check_threats(self) -> None:
        """Raise `InputError` unless there are two norms or more, each with a radius."""
        allowed = "the radii of two norms or more, such as {linf: 0.3, l2: 2}"
        ranges.require(len(self.threats) > 1, "threats", dict(self.threats), allowed)
        of_radii(self.threats)

    def under_all(self, threats: Mapping[str, float]) -> Self:
        """A copy for other radii."""
        return cast(Self, replace(cast(Any, self), threats=threats))


@dataclass
class AttackInSeveralNorms(SeveralNorms):
    """Base of what runs the same attack in balls of several norms.

    Parameters
    ----------
    attack
        Any attack but none, which gets the threat models of `threats` in place of its own.
    threats
        The radii of two norms or more, in pixel units of [0, 1].
    """

    attack: Attack
    threats: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check_threats()
        searches(self.attack, self.threats)

    @property
    def extremes(self) -> tuple[Threat, Threat]:
        """The innermost and the outermost of the balls, if all had the same radius."""
        found = sorted(of_radii(self.threats), key=lambda each: INNERMOST_FIRST.index(each.norm))
        return found[0], found[-1]


def searches(attack: Attack, threats: Mapping[str, float]) -> list[Attack]:
    """An attack under each of several threat models.

    Raises
    ------
    InputError
        If it is none, does not state its own, or has no form for one of the norms.
    """
    refuse_none(attack)
    allowed = "one that states a single threat model (attacks.Bounded)"
    single = states_threat(attack) and not several_threats(attack)
    ranges.require(single, "attack", type(attack).__name__, allowed)
    try:
        return [under(attack, threat) for threat in of_radii(threats)]
    except InputError as error:
        raise error.under("attack") from error
