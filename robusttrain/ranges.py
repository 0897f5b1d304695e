"""Range checks of configuration values: each raises `InputError` naming key, value and range."""

import math
from collections.abc import Sequence

from robusttrain.errors import InputError


def require(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raise `InputError` saying that `key=value` must be `allowed`, unless `ok`."""
    if not ok:
        raise InputError(key, value, allowed)


def at_least(low: float, **values: float) -> None:
    """Every value is finite and at least `low`."""
    for key, value in values.items():
        require(
            math.isfinite(value) and value >= low, key, value, f"a finite number, {low} or more"
        )


def above(low: float, **values: float) -> None:
    """Every value is finite and greater than `low`."""
    for key, value in values.items():
        require(math.isfinite(value) and value > low, key, value, f"a finite number above {low}")


def inside(low: float, high: float, **values: float) -> None:
    """Every value lies strictly between `low` and `high`."""
    for key, value in values.items():
        require(low < value < high, key, value, f"between {low} and {high}, both excluded")


def within(low: float, high: float, **values: float) -> None:
    """Every value lies in the closed interval from `low` to `high`."""
    for key, value in values.items():
        require(low <= value <= high, key, value, f"from {low} to {high}")


def one_of(allowed: Sequence[str], **values: str) -> None:
    """Every value is one of the words in `allowed`."""
    for key, value in values.items():
        require(value in allowed, key, value, f"one of {', '.join(allowed)}")
