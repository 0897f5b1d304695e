"""Range checks of configuration values, which raise `InputError` with key, value and range."""

import math
from collections.abc import Sequence

from robusttrain.errors import InputError

# The largest number of anything that torch counts.
LARGEST = 2**63 - 1


def require(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raise `InputError` for `key=value` unless `ok`; `allowed` describes the allowed values."""
    if not ok:
        raise InputError(key, value, allowed)


def at_least(low: float, **values: float) -> None:
    """Require that every value is finite and at least `low`."""
    for key, value in values.items():
        require(
            math.isfinite(value) and value >= low, key, value, f"a finite number, {low} or more"
        )


def count(**values: int) -> None:
    """Require that every value is a number of things, 1 or more, that torch can count."""
    at_least(1, **values)
    within(1, LARGEST, **values)


def above(low: float, **values: float) -> None:
    """Require that every value is finite and greater than `low`."""
    for key, value in values.items():
        require(math.isfinite(value) and value > low, key, value, f"a finite number above {low}")


def inside(low: float, high: float, **values: float) -> None:
    """Require that every value lies strictly between `low` and `high`."""
    for key, value in values.items():
        require(low < value < high, key, value, f"between {low} and {high}, both excluded")


def within(low: float, high: float, **values: float) -> None:
    """Require that every value lies in the closed interval from `low` to `high`."""
    for key, value in values.items():
        require(low <= value <= high, key, value, f"from {low} to {high}")


def one_of(allowed: Sequence[str], **values: str) -> None:
    """Require that every value is one of the words in `allowed`."""
    for key, value in values.items():
        require(value in allowed, key, value, f"one of {', '.join(allowed)}")
