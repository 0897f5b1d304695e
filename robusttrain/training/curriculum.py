"""Growth of the training attack over the epochs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from robusttrain import ranges
from robusttrain.attacks import Bounded, Iterated, parts, states_threat, threats, with_attack
from robusttrain.defenses import Growing
from robusttrain.errors import InputError

T = TypeVar("T")


@dataclass
class Curriculum:
    """Starts training against a weaker attack than the one that is asked for.

    A large radius from the first step on can leave training stuck at the uniform output.

    Parameters
    ----------
    eps_warmup
        Share of the epochs, from 0 to 1, over which the radii of the defense and of its attack grow
        linearly to their full values; a defense that has none has nothing to grow. What else a
        defense lets grow (`Growing`) grows with them.
    smooth
        Whether they grow with every batch, from 0 on, instead of with every epoch. Training on
        bounds (`defense=ibp`) needs it: those of an untrained network are wide at any radius.
    steps
        Numbers of attack steps, each for an equal share of the epochs; that of the attack
        throughout where empty.
    """

    eps_warmup: float = 0.0
    smooth: bool = False
    steps: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        ranges.within(0, 1, eps_warmup=self.eps_warmup)
        for number in self.steps:
            ranges.at_least(1, steps=number)

    def at(self, defense: T, epoch: int, epochs: int, passed: float = 0.0) -> T:
        """`defense` as it is in `epoch` of `epochs`, counted from 1, a share `passed` of it over.

        Raises
        ------
        InputError
            If neither the defense nor its attack has steps, or what radius there is is not known.
        """
        if self.eps_warmup > 0:
            growing = max(1.0, self.eps_warmup * epochs)
            share = min(1.0, (epoch - 1 + passed if self.smooth else epoch) / growing)
            defense = _grown(defense, share)
        if self.steps:
            number = self.steps[(epoch - 1) * len(self.steps) // epochs]
            defense = _with_steps(defense, number)
        return defense


def _grown(defense: T, share: float) -> T:
    """A copy with `share` of all radii, and of what grows with them."""
    if not states_threat(defense):
        raise _refusal("eps", defense, "says what its threat model is (attacks.Bounded)")
    if not threats(defense):
        return defense
    grown = defense.grown(share) if isinstance(defense, Growing) else defense
    return cast(T, _each(grown, lambda part: _smaller(part, share)))


def _with_steps(defense: T, steps: int) -> T:
    """A copy with so many attack steps."""
    if not any(isinstance(part, Iterated) for part in parts(defense)):
        raise _refusal("steps", defense, "has any (attacks.Iterated)")
    return _each(defense, lambda part: _stepped(part, steps))


def _each(component: T, change: Callable[[Any], Any]) -> T:
    """A copy of a defense or an attack, and of all that is in it, each part changed."""
    changed = change(component)
    if len(parts(changed)) > 1:
        changed = with_attack(changed, _each(changed.attack, change))
    return cast(T, changed)


def _smaller(part: Any, share: float) -> Any:
    threat = part.threat if isinstance(part, Bounded) else None
    return part if threat is None else part.under(threat.at(share * threat.eps))


def _stepped(part: Any, steps: int) -> Any:
    return part.with_steps(steps, part.step_size) if isinstance(part, Iterated) else part


def _refusal(key: str, defense: object, missing: str) -> InputError:
    name = type(defense).__name__
    reason = f"neither the defense {name} nor its attack {missing}"
    return InputError("training.curriculum", allowed=reason, problem=f"cannot change {key!r}")
