"""Growth of the training attack over the epochs."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

from robusttrain import ranges
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
        linearly to their full values; a defense without any has nothing to grow. What else a
        defense names in `grows` grows with them.
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
            If the number of steps, or a radius that there is, is no setting of the defense or of
            its attack.
        """
        if self.eps_warmup > 0 and has_radius(defense):
            growing = max(1.0, self.eps_warmup * epochs)
            share = min(1.0, (epoch - 1 + passed if self.smooth else epoch) / growing)
            for name in ("eps", *(defense.grows if isinstance(defense, Growing) else ())):
                defense = _changed(defense, name, lambda value: share * float(value))
        if self.steps:
            number = self.steps[(epoch - 1) * len(self.steps) // epochs]
            defense = _changed(defense, "steps", lambda _: number)
        return defense


def has_radius(component: Any) -> bool:
    return hasattr(component, "eps") or hasattr(getattr(component, "attack", None), "eps")


def _changed(component: T, name: str, change: Callable[[Any], Any]) -> T:
    """A copy of a component with `name` changed, in itself and in its attack where they have it."""
    attack: Any = getattr(component, "attack", None)
    changed = {name: change(getattr(component, name))} if _has(component, name) else {}
    if _has(attack, name):
        changed["attack"] = replace(attack, **{name: change(getattr(attack, name))})
    if not changed:
        raise InputError(
            f"training.curriculum cannot change {name!r}: neither the defense "
            f"{type(component).__name__} nor its attack has it"
        )
    return cast(T, replace(cast(Any, component), **changed))


def _has(component: Any, name: str) -> bool:
    return is_dataclass(component) and name in {f.name for f in fields(component) if f.init}
