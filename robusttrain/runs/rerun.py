"""`robusttrain rerun`: a run again, from its manifest alone, and how the two differ."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from robusttrain import renames
from robusttrain.checkpoints import checkpoint as checkpoints
from robusttrain.errors import InputError
from robusttrain.run_directory import BEST, MANIFEST, TABLES
from robusttrain.runs.resume import quoted

# What a clock says is no result.
TIMES = ["seconds"]

# What else may explain a difference.
CIRCUMSTANCES = (
    "data", "device_name", "threads", "processes", "python", "platform", "versions", "git",
)  # fmt: skip


@dataclass(frozen=True)
class Repetition:
    """A finished run, and the directory beside it that it is repeated in.

    Parameters
    ----------
    run
        The directory of the run.
    manifest
        What its `manifest.json` says.
    """

    run: Path
    manifest: dict[str, Any]

    @classmethod
    def of(cls, arguments: Sequence[str]) -> "Repetition":
        """The repetition that a command line asks for.

        Raises
        ------
        InputError
            If it names no finished run, or the run was repeated already.
        """
        if len(arguments) != 1:
            raise InputError("robusttrain rerun RUN takes the directory of one run")
        run = Path(arguments[0])
        try:
            manifest = json.loads((run / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            problem = f"is no finished run, with {MANIFEST} in it"
            raise InputError(f"rerun {run}", problem=problem) from error
        if "overrides" not in manifest:
            problem = "was made by a version that kept no overrides"
            raise InputError(f"rerun {run}", problem=problem)
        repetition = cls(run, manifest)
        if repetition.folder.exists():
            allowed = f"{repetition.folder} is there"
            raise InputError(f"rerun {run}", allowed=allowed, problem="was repeated before")
        return repetition

    @property
    def folder(self) -> Path:
        """Where it is repeated."""
        return self.run.absolute().with_name(f"{self.run.absolute().name}-rerun")

    @property
    def command(self) -> list[str]:
        """The words behind `robusttrain` that repeat it."""
        given: list[str] = self.manifest["overrides"]
        return [*given, f"hydra.run.dir={quoted(self.folder)}"]

    def differences(self) -> list[str]:
        """A line for each file that differs, and for each circumstance that might explain it."""
        tables = [line for name in TABLES if (line := self._table(name)) is not None]
        results = [*tables, *self._weights()]
        again = json.loads((self.folder / MANIFEST).read_text())
        changed = [key for key in CIRCUMSTANCES if self.manifest.get(key) != again.get(key)]
        return [*results, *(f"{key} has changed, too" for key in changed)] if results else []

    def _table(self, name: str) -> str | None:
        paths = (self.run / name, self.folder / name)
        there = [path.is_file() for path in paths]
        if not all(there):
            return f"{name} is only in one of the two" if any(there) else None
        one, other = (_read(path) for path in paths)
        if one.equals(other):
            return None
        if one.shape != other.shape or list(one) != list(other):
            return f"{name} differs: {one.shape} rows and columns, now {other.shape}"
        unequal = ((one != other) & ~(one.isna() & other.isna())).to_numpy()
        row, column = np.argwhere(unequal)[0]
        return (
            f"{name} differs in {int(unequal.sum())} values, first {one.columns[column]} of row "
            f"{row}: {one.iloc[row, column]!s}, now {other.iloc[row, column]!s}"
        )

    def _weights(self) -> list[str]:
        if not (self.run / BEST).is_file():
            return []
        one, other = (checkpoints.load(folder).model for folder in (self.run, self.folder))
        unequal = [key for key in one if not torch.equal(one[key], other[key])]
        return [f"{BEST} differs in {', '.join(unequal)}"] if unequal else []


def _read(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, dtype=str).drop(columns=TIMES, errors="ignore")
    return table.replace({"check": renames.CHECKS})
