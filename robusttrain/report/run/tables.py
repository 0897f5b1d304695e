"""The files of a run as its page needs them; files that are missing give no part of the page."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from numpy.typing import NDArray

from robusttrain.errors import InputError, printable
from robusttrain.report.files import read_arrays, read_csv, read_json
from robusttrain.report.identity import refuse_mixed, warn_if_unfinished
from robusttrain.report.ledger import CLEAN, UNION, WORST_CASE
from robusttrain.run_directory import (
    CERTIFIED,
    CURVE,
    GALLERY,
    MANIFEST,
    REPORT,
    RESULT,
    SAMPLES,
    TABLES,
    TRAIN,
)


class Missing(Exception):  # noqa: N818 - a reason, not a failure
    """Why a part of a page is left out, as a sentence."""


@dataclass(frozen=True)
class Tables:
    """The files in the directory of a run.

    Parameters
    ----------
    folder
        The directory.
    tables
        Its tables, by the names of their files.
    manifest, result
        Its other files; empty if they do not exist.
    gallery
        The arrays of `gallery.npz`; empty if it does not exist.
    """

    folder: Path
    tables: Mapping[str, pd.DataFrame]
    manifest: Mapping[str, Any]
    result: Mapping[str, Any]
    gallery: Mapping[str, NDArray[Any]]

    @classmethod
    def read(cls, folder: Path) -> "Tables":
        """Read the directory of a run.

        Raises
        ------
        InputError
            If it has neither figures nor a training, or holds results of several runs, or edited
            or damaged ones.
        """
        if not any((folder / name).is_file() for name in (REPORT, TRAIN)):
            reason, problem = f"it has neither {REPORT} nor {TRAIN}", "is not a run with results"
            raise InputError(str(folder), allowed=reason, problem=problem)
        warn_if_unfinished(folder)
        refuse_mixed(folder, [*TABLES, GALLERY])
        found = {name: read_csv(folder / name) for name in TABLES if (folder / name).is_file()}
        manifest, result = read_json(folder / MANIFEST), read_json(folder / RESULT)
        return cls(folder, found, manifest, result, read_arrays(folder / GALLERY) or {})

    def table(self, name: str, why: str) -> pd.DataFrame:
        """The table of a file, or raise `Missing`: `why` says when there is none."""
        if name not in self.tables or self.tables[name].empty:
            raise Missing(f"There is no {name}: {why}.")
        return self.tables[name]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of `report.csv`; none if nothing was evaluated."""
        report = self.tables.get(REPORT, pd.DataFrame())
        return [{str(k): v for k, v in row.items()} for row in report.to_dict("records")]

    @property
    def clean(self) -> dict[str, Any] | None:
        """The row `clean`."""
        return next((row for row in self.rows if row["attack"] == CLEAN), None)

    @property
    def worst(self) -> list[dict[str, Any]]:
        """The rows `worst_case`, one for each threat model."""
        return [row for row in self.rows if row["attack"] == WORST_CASE]

    @property
    def quoted(self) -> dict[str, Any] | None:
        """The row over all attacks: the worst case, or the union of several."""
        chosen = [row for row in self.rows if row["attack"] in (WORST_CASE, UNION)]
        return chosen[-1] if chosen else None

    @property
    def samples(self) -> pd.DataFrame:
        """`samples.csv`."""
        return self.table(SAMPLES, "the run evaluated nothing")

    @property
    def attacks(self) -> list[str]:
        """The attacks of `samples.csv`, in the order in which they ran."""
        suffix = "_broken"
        return [str(c).removesuffix(suffix) for c in self.samples if str(c).endswith(suffix)]

    def attack_row(self, name: str) -> dict[str, Any]:
        """The row of an attack in `report.csv`."""
        return next(row for row in self.rows if row["attack"] == name)

    @cached_property
    def class_names(self) -> list[str]:
        """The name of each class, or its number."""
        names = list(self.manifest.get("dataset", {}).get("classes", {}))
        if names or SAMPLES not in self.tables:
            return names
        return [str(label) for label in range(int(self.samples["label"].max()) + 1)]

    def class_name(self, label: int) -> str:
        """The name of a class; -1 is a model that abstains."""
        if label < 0:
            return "abstains"
        return printable(self.class_names[label]) if label < len(self.class_names) else str(label)

    @property
    def names(self) -> Mapping[str, str]:
        """What was chosen for each group, as far as it is known."""
        known = {key: str(value) for key, value in (self.clean or {}).items()}
        shown = ("dataset", "model", "defense", "train_attack", "noise")
        of_report = {key: known[key] for key in shown if known.get(key)}
        return {**self.result.get("names", {}), **of_report}


def certified_norm(curve: pd.DataFrame) -> str:
    """The norm of the certificates whose curve this is."""
    return str(curve["norm"].iloc[0])


def curve_of(tables: Tables, name: str, why: str) -> pd.DataFrame:
    """The points of a curve of `curve.csv`; `why` says when there are none."""
    curve = tables.table(CURVE, why)
    points = curve[curve["curve"] == name]
    if points.empty:
        raise Missing(f"{CURVE} has no curve {name}: {why}.")
    return points.reset_index(drop=True)


def certificates(tables: Tables) -> pd.DataFrame:
    """`certified.csv`."""
    return tables.table(CERTIFIED, "the run certified nothing (evaluation=certify)")


def epochs(tables: Tables) -> pd.DataFrame:
    """`train.csv`."""
    return tables.table(TRAIN, "the run trained nothing")


def best_epoch(train: pd.DataFrame) -> int:
    """The epoch whose weights are in `best.pt`: by robust, then by clean validation accuracy."""
    order = train.assign(
        robust=train["val_robust_accuracy"].fillna(0.0),
        clean=train["val_clean_accuracy"].fillna(0.0),
        sound=~train["overfit"].astype(bool) if "overfit" in train else True,
    )
    keys = order[["robust", "clean", "sound"]].apply(tuple, axis=1)
    # Of equal ones the last.
    return int(train["epoch"][max(range(len(train)), key=lambda row: (keys.iloc[row], row))])
