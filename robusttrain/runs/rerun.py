"""`robusttrain rerun`: repeat a run from its manifest alone, and compare the results."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from robusttrain import renames
from robusttrain.checkpoints import checkpoint as checkpoints
from robusttrain.checkpoints.initial_weights import digest_of
from robusttrain.errors import InputError
from robusttrain.report.files import intact
from robusttrain.report.identity import refuse_mixed
from robusttrain.run_directory import BEST, MANIFEST, TABLES
from robusttrain.runs.resume import TRUST, quoted
from robusttrain.runs.trust import trust_in, trusted_words

# Durations are no results.
TIMES = ["seconds", "proof_seconds"]

# Where an image is found.
PLACE = ["index", "index_in"]

# Entries of the manifest that may explain a difference.
CIRCUMSTANCES = (
    "data", "weights", "device_name", "threads", "processes", "python", "platform", "versions",
    "git",
)  # fmt: skip


@dataclass(frozen=True)
class Repetition:
    """A finished run, and its repetition in a directory next to it.

    Parameters
    ----------
    run
        The directory of the run.
    manifest
        The content of its `manifest.json`.
    words
        The arguments of its command, as far as the user trusts them.
    """

    run: Path
    manifest: dict[str, Any]
    words: tuple[str, ...]

    @classmethod
    def of(cls, arguments: Sequence[str]) -> "Repetition":
        """The repetition that the arguments of `robusttrain rerun` ask for.

        Raises
        ------
        InputError
            If they do not name one finished run, or it has already been repeated, or its directory
            holds results of several runs, or edited ones, or its command needs trust that is not
            given.
        """
        trust = [name for word in arguments for name in trust_in(word)]
        runs = [word for word in arguments if not word.startswith(TRUST)]
        if len(runs) != 1:
            problem = "takes the directory of one run"
            allowed = "robusttrain rerun RUN, and trust=[...] if it needs that"
            raise InputError("rerun", allowed=allowed, problem=problem)
        run = Path(runs[0])
        try:
            manifest = json.loads((run / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            reason, problem = f"{MANIFEST} is missing or damaged", "is not a finished run"
            raise InputError(f"rerun {run}", allowed=reason, problem=problem) from error
        if "overrides" not in manifest:
            problem = "was made by a version that did not save overrides"
            raise InputError(f"rerun {run}", problem=problem)
        refuse_mixed(run, [*TABLES, BEST])
        with intact(run / MANIFEST):
            words = trusted_words(list(map(str, manifest["overrides"])), trust, f"{run / MANIFEST}")
        _refuse_other_weights(run, manifest.get("weights"))
        repetition = cls(run, manifest, tuple(words))
        if repetition.folder.exists():
            reason, problem = f"{repetition.folder} exists", "has already been repeated"
            raise InputError(f"rerun {run}", allowed=reason, problem=problem)
        return repetition

    @property
    def folder(self) -> Path:
        """The directory of the repetition."""
        return self.run.absolute().with_name(f"{self.run.absolute().name}-rerun")

    @property
    def command(self) -> list[str]:
        """The arguments of `robusttrain` that repeat the run."""
        return [*self.words, f"hydra.run.dir={quoted(self.folder)}"]

    def differences(self) -> list[str]:
        """A line for each file that differs, and for each entry that may explain why."""
        tables = [line for name in TABLES if (line := self._table(name)) is not None]
        results = [*tables, *self._weights()]
        return [*results, *(f"also changed: {key}" for key in self._changed())] if results else []

    def agreement(self) -> str:
        """The line for results that do not differ, with what did change."""
        changed = self._changed()
        although = f", although these changed: {', '.join(changed)}" if changed else ""
        return f"the same results as {self.run}{although}"

    def _changed(self) -> list[str]:
        again = json.loads((self.folder / MANIFEST).read_text())
        return [key for key in CIRCUMSTANCES if self.manifest.get(key) != again.get(key)]

    def _table(self, name: str) -> str | None:
        paths = (self.run / name, self.folder / name)
        there = [path.is_file() for path in paths]
        if not all(there):
            return f"{name} exists in only one of the two runs" if any(there) else None
        one, other = (_read(path) for path in paths)
        if "index_in" not in one:
            # Earlier versions counted positions otherwise.
            one, other = (table.drop(columns=PLACE, errors="ignore") for table in (one, other))
        if one.equals(other):
            return None
        if one.shape != other.shape or list(one) != list(other):
            before, now = (f"{len(table)} x {len(table.columns)}" for table in (one, other))
            return f"{name} differs in shape: {before}, now {now} (rows x columns)"
        unequal = ((one != other) & ~(one.isna() & other.isna())).to_numpy()
        row, column = np.argwhere(unequal)[0]
        return (
            f"{name} differs, first in {one.columns[column]} of row {row}: "
            f"{one.iloc[row, column]!s}, now {other.iloc[row, column]!s} "
            f"(values that differ: {int(unequal.sum())})"
        )

    def _weights(self) -> list[str]:
        if not (self.run / BEST).is_file():
            return []
        one, other = (checkpoints.load(run / BEST).model for run in (self.run, self.folder))
        unequal = [key for key in one if not torch.equal(one[key], other[key])]
        return [f"{BEST} differs in {', '.join(unequal)}"] if unequal else []


def _refuse_other_weights(run: Path, weights: Mapping[str, str | None] | None) -> None:
    """Refuse to repeat a run if the file that its model started with is another one now."""
    if weights is None or weights["sha256"] is None:
        return
    file = Path(str(weights["path"]))
    if not file.is_file():
        problem = "cannot be repeated without the weights that it started with"
        raise InputError(f"rerun {run}", allowed=f"{file} is not there", problem=problem)
    if digest_of(file) != weights["sha256"]:
        problem = "started with other weights"
        raise InputError(f"rerun {run}", allowed=f"{file} has changed since", problem=problem)


def _read(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, dtype=str).drop(columns=TIMES, errors="ignore")
    return table.replace({"check": renames.CHECKS})
