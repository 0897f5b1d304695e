"""Loggers: services that receive a run's figures while it runs, in addition to its files.

A logger is a dataclass that is a `Logger`. All loggers get the same figures under the same names:

- `train/<column>` for the columns of `train.csv`, with the epoch as the step;
- `report/<attack>/<column>` for the measured columns of `report.csv`; the step is the epoch of the
  evaluated weights, or 0 if this run did not train them.

The figures are not rounded as in the CSV files. Missing figures are omitted.
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
"""Writes figures, by their names, for an epoch."""


class Logger(Protocol):
    """A service that receives the figures of runs."""

    def check(self) -> None:
        """Raise `InputError` if a package that this logger needs is not installed.

        It writes nothing.
        """

    def record(
        self, run_dir: Path, parameters: Mapping[str, Any]
    ) -> AbstractContextManager[Record]:
        """A context that yields a `Record` for the run in `run_dir`.

        It is closed at the end of the run, also if the run fails. `parameters` is the resolved
        configuration, as `flattened` returns it.
        """


def require(option: str, *modules: str) -> None:
    """Raise `InputError`, with the option and its extra, unless all `modules` can be imported."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            problem = f"needs a package that is not installed ({error})"
            allowed = f"pip install 'robusttrain[{option}]'"
            raise InputError("logger", option, allowed, problem) from error


def epoch_figures(row: Mapping[str, Any]) -> Figures:
    """The figures of a row of `train.csv`, by their names."""
    return _without_missing({f"train/{key}": row[key] for key in row if key != "epoch"})


def report_figures(rows: Iterable[Mapping[str, Any]]) -> Figures:
    """The figures of the rows of `report.csv`, by their names."""
    figures: dict[str, float] = {}
    rows = list(rows)
    attacks = [row["attack"] for row in rows]
    for row in rows:
        # If an attack has several rows, the threat model is part of the name.
        alone = attacks.count(row["attack"]) == 1
        words = row["attack"] if alone else f"{row['attack']} {row['norm']} {row['eps']:g}"
        # The names of adapted attacks have spaces and =, which MLflow refuses.
        name = re.sub(r"[^\w.-]", "_", words)
        figures |= {f"report/{name}/{key}": row[key] for key in MEASURED}
    return _without_missing(figures)


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested configuration by their full keys, such as `attack.steps`."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        values |= flattened(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return values


def _without_missing(figures: Mapping[str, float | None]) -> Figures:
    known = {name: value for name, value in figures.items() if value is not None}
    return {name: float(value) for name, value in known.items() if not math.isnan(value)}
