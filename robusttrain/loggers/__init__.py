"""Loggers: places beside the files of a run that get its figures, to be looked at while it goes on.

A logger is a dataclass that is a `Logger`. All of them get the same figures under the same names,
made of the file that has them, the row, and the column:

- `train/<column>` for the columns of `train.csv`, at the number of the epoch;
- `report/<attack>/<column>` for those of `report.csv` that are measured, at the number of the epoch
  that the evaluated weights are of, or 0 where this run did not train them.

They are the figures before a CSV rounds them. Those that are not known are left out.
"""

import importlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from robusttrain.errors import InputError

MEASURED = (
    "eps", "n", "accuracy", "ci_low", "ci_high", "forward", "backward", "seconds", "invalid",
)  # fmt: skip

Figures = Mapping[str, float]

Record = Callable[[Figures, int], None]
"""(figures by their names, epoch) -> they are written."""


class Logger(Protocol):
    """A place for the figures of runs."""

    def check(self) -> None:
        """Raise `InputError` if a package that this logger needs is not installed.

        Nothing is written yet.
        """

    def record(
        self, run_dir: Path, parameters: Mapping[str, Any]
    ) -> AbstractContextManager[Record]:
        """What takes the figures of the run in `run_dir`; closed at its end, also if it fails.

        `parameters` is the configuration, resolved, as `flat` makes it.
        """


def require(option: str, *modules: str) -> None:
    """Raise `InputError`, naming the option and its extra, unless all `modules` can be imported."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            problem = f"needs a package that is not installed ({error})"
            allowed = f"pip install 'robusttrain[{option}]'"
            raise InputError("logger", option, allowed, problem) from error


def of_epoch(row: Mapping[str, Any]) -> Figures:
    """The figures of a row of `train.csv`, by their names."""
    return _known({f"train/{key}": value for key, value in row.items() if key != "epoch"})


def of_report(rows: Iterable[Mapping[str, Any]]) -> Figures:
    """The figures of the rows of `report.csv`, by their names."""
    figures: dict[str, float] = {}
    rows = list(rows)
    attacks = [row["attack"] for row in rows]
    for row in rows:
        # Several worst cases are told apart by their threat models.
        alone = attacks.count(row["attack"]) == 1
        words = row["attack"] if alone else f"{row['attack']} {row['norm']} {row['eps']:g}"
        # An attack that had to be changed has spaces and = in its name, which MLflow refuses.
        name = re.sub(r"[^\w.-]", "_", words)
        figures |= {f"report/{name}/{key}": row[key] for key in MEASURED}
    return _known(figures)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested configuration by their full keys, such as `attack.steps`."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        values |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return values


def _known(figures: Mapping[str, float | None]) -> Figures:
    known = {name: value for name, value in figures.items() if value is not None}
    return {name: float(value) for name, value in known.items() if not math.isnan(value)}
