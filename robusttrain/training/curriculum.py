"""A schedule of the training attack: its radius and its number of steps over the epochs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from robusttrain import ranges
from robusttrain.attacks import (
    Bounded,
    Iterated,
    MultiBounded,
    parts,
    states_threat,
    threats,
    with_attack,
)
from robusttrain.defenses import Scheduled
from robusttrain.errors import InputError

T = TypeVar("T")

# Share of a smooth warm-up after which the radii grow linearly.
BEND = 0.25


@dataclass
class Curriculum:
    """Starts training against a weaker attack than the configured one.

    A large radius from the first step on can leave training stuck at the uniform output.

    Parameters
    ----------
    eps_warmup
        Share of the epochs, from 0 to 1, over which the radii of the defense and of its attack grow
        linearly to their full values. It has no effect on a defense without a radius. Whatever else
        a `Scheduled` defense schedules grows with the radii.
    eps_delay
        Share of the epochs, from 0 to 1 - `eps_warmup`, before the radii start to grow. Until then
        they are 0.
    smoothed
        Whether the radii grow with the fourth power of time over the first quarter of the warm-up,
        and linearly with the same slope from there on, as in the code of CROWN-IBP (Zhang et al.
        2020) and Shi et al. 2021. Otherwise they grow linearly throughout.
    per_batch
        Whether the radii grow with every batch, from 0 on, instead of with every epoch. Training on
        bounds (`defense=ibp`) needs it: the bounds of an untrained network are wide at any radius.
    steps
        Numbers of attack steps, each for an equal share of the epochs. An empty list keeps the
        attack's own number throughout.
    """

    eps_warmup: float = 0.0
    eps_delay: float = 0.0
    smoothed: bool = False
    per_batch: bool = False
    steps: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        ranges.within(0, 1, eps_warmup=self.eps_warmup)
        ranges.within(0, 1 - self.eps_warmup, eps_delay=self.eps_delay)
        for number in self.steps:
            ranges.at_least(1, steps=number)

    def unused(self) -> dict[str, str]:
        """How the radii grow, without a warm-up."""
        keys = ("eps_delay", "smoothed", "per_batch")
        return {} if self.eps_warmup > 0 else dict.fromkeys(keys, "eps_warmup")

    def at(self, defense: T, epoch: int, epochs: int, passed: float = 0.0) -> T:
        """`defense` for `epoch` of `epochs`, counted from 1, after a share `passed` of that epoch.

        Raises
        ------
        InputError
            If neither the defense nor its attack has steps to set, or if an attack does not state
            its radius.
        """
        if self.eps_warmup > 0:
            growing = max(1.0, self.eps_warmup * epochs)
            grown = (epoch - 1 + passed if self.per_batch else epoch) - self.eps_delay * epochs
            share = min(1.0, max(0.0, grown / growing))
            defense = _scaled(defense, smooth(share) if self.smoothed else share)
        if self.steps:
            number = self.steps[(epoch - 1) * len(self.steps) // epochs]
            defense = _with_steps(defense, number)
        return defense


def smooth(share: float) -> float:
    """A curve from 0 to 1: the fourth power, scaled, up to 1/4, then a line with its slope.

    >>> [round(smooth(share), 3) for share in (0, 0.125, 0.25, 0.625, 1)]
    [0.0, 0.005, 0.077, 0.538, 1.0]
    """
    # Of the value 1 at share = 1: factor * (BEND^4 + 4 BEND^3 (1 - BEND)) = 1.
    factor = 1 / (BEND**4 + 4 * BEND**3 * (1 - BEND))
    if share < BEND:
        return factor * share**4
    return factor * (BEND**4 + 4 * BEND**3 * (share - BEND))


def _scaled(defense: T, share: float) -> T:
    """A copy with all radii times `share`, and with everything else that is scheduled."""
    if not states_threat(defense):
        raise _refusal("eps", defense, "states its threat model (attacks.Bounded)")
    if not threats(defense):
        return defense
    scheduled = defense.scheduled(share) if isinstance(defense, Scheduled) else defense
    return cast(T, _each(scheduled, lambda part: _with_radius(part, share)))


def _with_steps(defense: T, steps: int) -> T:
    """A copy whose attack takes `steps` steps."""
    if not any(isinstance(part, Iterated) for part in parts(defense)):
        raise _refusal("steps", defense, "has any (attacks.Iterated)")
    return _each(defense, lambda part: _iterated(part, steps))


def _each(component: T, change: Callable[[Any], Any]) -> T:
    """A copy of a defense or an attack, with `change` applied to it and to all attacks in it."""
    changed = change(component)
    if len(parts(changed)) > 1:
        changed = with_attack(changed, _each(changed.attack, change))
    return cast(T, changed)


def _with_radius(part: Any, share: float) -> Any:
    if isinstance(part, MultiBounded):
        return part.under_all({norm: share * eps for norm, eps in part.threats.items()})
    threat = part.threat if isinstance(part, Bounded) else None
    return part if threat is None else part.under(threat.at(share * threat.eps))


def _iterated(part: Any, steps: int) -> Any:
    return part.with_steps(steps, part.step_size) if isinstance(part, Iterated) else part


def _refusal(key: str, defense: object, missing: str) -> InputError:
    name = type(defense).__name__
    reason = f"neither the defense {name} nor its attack {missing}"
    return InputError("training.curriculum", allowed=reason, problem=f"cannot change {key!r}")
