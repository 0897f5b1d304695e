"""Accuracies that an evaluation has to reach: given ones, and those of a baseline run."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from robusttrain.attacks import threat_of
from robusttrain.errors import InputError
from robusttrain.evaluation.settings import Evaluation
from robusttrain.report.compare import FIGURES, Run, read_run
from robusttrain.report.files import intact
from robusttrain.report.ledger import CLEAN, UNION, WORST_CASE
from robusttrain.run_directory import MANIFEST, REPORT
from robusttrain.threat import Threat

BASELINE = "evaluation.baseline"

# A report has six significant digits of an accuracy.
ROUNDING = 1e-6

Rows = Sequence[Mapping[str, Any]]
"""The rows of a `report.csv`."""


class Requirement(NamedTuple):
    """A requirement, and what was found.

    Parameters
    ----------
    key
        The key that requires it.
    figure
        The row of the report, or `audit` or `training`.
    threat
        The threat model of the row, such as `linf, eps 0.03`; empty for `clean` and unions.
    value
        The accuracy as a share, or a verdict; None if the report has no such row.
    required
        The least accuracy, or the allowed verdict.
    met
        Whether the value is allowed.
    """

    key: str
    figure: str
    threat: str
    value: float | str | None
    required: float | str
    met: bool

    @property
    def line(self) -> str:
        """The requirement in words."""
        words = "worst case" if self.figure == WORST_CASE else self.figure
        subject = f"{words} ({self.threat})" if self.threat else words
        return f"{subject} is {_shown(self.value)}, but {self.key} {_asked(self.required)}"


@dataclass(frozen=True)
class Baseline:
    """The figures of an earlier run on the same images.

    Parameters
    ----------
    run
        The run.
    rows
        All rows of its report.
    digest
        The digest of its test set.
    """

    run: Run
    rows: Rows
    digest: str

    @classmethod
    def read(cls, folder: Path) -> "Baseline":
        """The baseline in the directory of a run.

        Raises
        ------
        InputError
            If the run has not finished an evaluation, or is damaged.
        """
        try:
            run = read_run(folder)
            manifest = folder / MANIFEST
            if not manifest.is_file():
                raise InputError(str(folder), problem=f"has no {MANIFEST}: it is unfinished")
            with intact(manifest):
                digest = str(json.loads(manifest.read_text())["data"]["test"])
        except InputError as error:
            raise InputError(BASELINE, folder, str(error), "cannot be used") from error
        return cls(run, rows_in(folder), digest)

    def refuse_other_threats(self, dataset: str, threats: Sequence[Threat]) -> None:
        """Raise `InputError` if the baseline has another data set or other threat models."""
        before = str(self.run.clean["dataset"])
        self._require(before == dataset, f"dataset={before}, and this run dataset={dataset}")
        # As text, since a report has six digits of a radius.
        found, own = ([str(threat) for threat in each] for each in (self.run.threats, threats))
        difference = f"the threat model {' and '.join(found)}, and this run {' and '.join(own)}"
        self._require(set(found) == set(own), difference)

    def refuse_other_images(self, digest: str, index: Sequence[int], index_in: str) -> None:
        """Raise `InputError` if the baseline was evaluated on other images.

        Parameters
        ----------
        digest
            The digest of the test set.
        index, index_in
            The positions of the images that are evaluated, and what they count, as in
            `samples.csv`.
        """
        self._require(digest == self.digest, "another test set")
        counts = f"positions in the {self.run.index_in}, and this run in the {index_in}"
        self._require(self.run.index_in == index_in, f"{counts}; evaluate it again")
        before = sorted(self.run.label.index)
        counts = f"{len(before)} images, and this run {len(index)}"
        self._require(len(before) == len(index), counts)
        self._require(before == sorted(index), "other images of the test set")

    def _require(self, same: bool, difference: str) -> None:
        if not same:
            folder, problem = self.run.folder, "cannot be compared with this run"
            raise InputError(BASELINE, folder, f"it has {difference}", problem)


def rows_in(folder: Path) -> Rows:
    """The rows of the report in the directory of a run."""
    empty = {key: [""] for key in FIGURES}
    report = pd.read_csv(folder / REPORT, keep_default_na=False, na_values=empty)
    return [{str(key): value for key, value in row.items()} for row in report.to_dict("records")]


def threats_of(settings: Evaluation, threat: Threat) -> list[Threat]:
    """The threat models that worst cases are reported for, in a run with this `threat`."""
    stated = [threat_of(attack) or threat for attack in settings.attacks.values()]
    return list(dict.fromkeys(stated)) or [threat.at(0)]


def requirements(
    settings: Evaluation, rows: Rows, baseline: Baseline | None
) -> Iterator[Requirement]:
    """Every required accuracy of an evaluation, with the one that it has.

    Parameters
    ----------
    settings
        The settings of the evaluation.
    rows
        Its report.
    baseline
        The run of `evaluation.baseline`.
    """
    for figure, least in settings.require.items():
        key, found = f"evaluation.require.{figure}", [r for r in rows if _is_of(r, figure)]
        if not found:
            yield Requirement(key, figure, "", None, least, met=False)
        for row in found:
            yield _reached(key, row, least)
    before = {_key(row): row["accuracy"] for row in baseline.rows} if baseline else {}
    for row in rows:
        if _key(row) in before and any(_is_of(row, name) for name in settings.figures):
            yield _reached(BASELINE, row, before[_key(row)] - settings.tolerance)


def _reached(key: str, row: Mapping[str, Any], least: float) -> Requirement:
    met = row["accuracy"] >= least - ROUNDING
    return Requirement(key, row["attack"], _threat(row), row["accuracy"], least, met=met)


def _is_of(row: Mapping[str, Any], figure: str) -> bool:
    """Whether a row is that of an attack, which may be fitted to few classes, and named so."""
    return str(row["attack"]) == figure or str(row["attack"]).startswith(f"{figure} ")


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["attack"], str(row["norm"]), f"{row['eps']:.6g}"


def _threat(row: Mapping[str, Any]) -> str:
    return "" if row["attack"] in (CLEAN, UNION) else f"{row['norm']}, eps {row['eps']:.6g}"


def _shown(value: float | str | None) -> str:
    if value is None:
        return "no figure of this evaluation"
    return value if isinstance(value, str) else f"{value:.2%}"


def _asked(required: float | str) -> str:
    return f"requires {required if isinstance(required, str) else f'{required:.2%} or more'}"
