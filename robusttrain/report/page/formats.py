"""Numbers as pages write them."""

import math
from collections.abc import Mapping
from typing import Any

# Numbers from here on have no digits behind the point.
LARGE = 1000


def percent(share: float | None, digits: int = 1) -> str:
    """A share from 0 to 1 in percent; a dash where it is not known."""
    return "–" if share is None or math.isnan(share) else f"{100 * share:.{digits}f} %"


def interval(row: Mapping[str, Any]) -> str:
    """The ends of the interval of a row of `report.csv`, in percent; a dash where there is none."""
    if math.isnan(row["ci_low"]):
        return "–"
    return f"{100 * row['ci_low']:.1f} to {100 * row['ci_high']:.1f} %"


def figure(value: Any) -> str:
    """A number in four significant digits or more, text as it is; a dash where it is not known."""
    if is_unknown(value):
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    whole = float(value).is_integer() or abs(value) >= LARGE
    return f"{round(value):,}".replace(",", " ") if whole else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """Seconds in the largest units that are worth reading."""
    if seconds is None or math.isnan(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 60 else f"{hours:.1f} h"


def is_unknown(value: Any) -> bool:
    """Whether a cell of a table is empty."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def is_number(value: Any) -> bool:
    """Whether a cell of a table is aligned as a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)
