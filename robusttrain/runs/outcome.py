"""`result.json`: what a run has come to, for programs that read it; and its exit code."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from robusttrain.config.schema import GROUPS
from robusttrain.evaluation.requirements import Requirement, Rows
from robusttrain.exit_codes import ExitCode
from robusttrain.report.files import intact
from robusttrain.report.ledger import CLEAN, UNION, WORST_CASE
from robusttrain.report.proofs import BROKEN_PROOFS, EXCEEDED_BOUNDS
from robusttrain.report.radii import Median
from robusttrain.run_directory import RESULT
from robusttrain.runs.training_attack import TRAIN_ATTACK
from robusttrain.training.diagnostics import Finding

FAILED = "fail"
STRICT = "evaluation.strict"
SOUND = "no warning"


class Outcome(NamedTuple):
    """What a run has come to.

    Parameters
    ----------
    rows
        Its report; none if nothing was evaluated.
    findings
        The problems of its training; None if nothing was trained.
    requirements
        What was required of it.
    medians
        The median radius in each norm, if radii were searched.
    """

    rows: Rows
    findings: Sequence[Finding] | None
    requirements: Sequence[Requirement]
    medians: Sequence[Median] = ()

    @property
    def unmet(self) -> list[str]:
        """A line for each requirement that is not met."""
        return [requirement.line for requirement in self.requirements if not requirement.met]

    def content(self, names: Mapping[str, str], seed: int, files: Sequence[str]) -> dict[str, Any]:
        """The content of `result.json`.

        Parameters
        ----------
        names
            The chosen option of each group, and the training attack.
        seed
            The seed of the run.
        files
            The names of its result files.
        """
        worst = [_figure(row) for row in self.rows if row["attack"] == WORST_CASE]
        training = {"findings": [finding._asdict() for finding in self.findings or ()]}
        return {
            "exit_code": int(ExitCode.unmet if self.unmet else ExitCode.success),
            "clean": next((_figure(r) for r in self.rows if r["attack"] == CLEAN), None),
            "worst_case": worst,
            "union": next((_figure(r) for r in self.rows if r["attack"] == UNION), None),
            "audit": self.rows[-1]["audit"] if self.rows else None,
            "radii": [median.as_dict() for median in self.medians],
            "training": None if self.findings is None else training,
            "requirements": [one._asdict() for one in self.requirements],
            "names": {key: names[key] for key in (*GROUPS, TRAIN_ATTACK) if key in names},
            "seed": seed,
            "files": list(files),
        }


def strictly(rows: Rows, findings: Sequence[Finding] | None) -> Iterator[Requirement]:
    """What `evaluation.strict` requires: no audit that fails, and a training without problems."""
    if rows:
        verdict = str(rows[-1]["audit"])
        yield Requirement(STRICT, "audit", "", verdict, "pass or warn", met=verdict != FAILED)
    if findings is not None:
        found = ", ".join(f"{one.problem} in epoch {one.epoch}" for one in findings)
        yield Requirement(STRICT, "training", "", found or SOUND, SOUND, met=not findings)


def uncontradicted(key: str, checks: Rows) -> Iterator[Requirement]:
    """What every proof requires, whatever is set: that no attack contradicts it.

    Parameters
    ----------
    key
        The key that asks for proofs.
    checks
        The rows of `audit.csv`.
    """
    for check in checks:
        if check["check"] in (BROKEN_PROOFS, EXCEEDED_BOUNDS):
            found = f"{check['figure']:g}"
            yield Requirement(key, check["check"], "", found, "0", met=found == "0")


def exit_code(run_dir: Path) -> ExitCode:
    """The exit code of the finished run in a directory; those of earlier versions have met all."""
    return ExitCode(_read(run_dir).get("exit_code", ExitCode.success))


def unmet(run_dir: Path) -> list[str]:
    """A line for each requirement that the finished run in a directory does not meet."""
    with intact(run_dir / RESULT):
        found = [Requirement(**one) for one in _read(run_dir).get("requirements", ())]
    return [requirement.line for requirement in found if not requirement.met]


def _read(run_dir: Path) -> dict[str, Any]:
    path = run_dir / RESULT
    if not path.is_file():
        return {}
    with intact(path):
        return dict(json.loads(path.read_text()))


def _figure(row: Mapping[str, Any]) -> dict[str, Any]:
    """A figure with its threat model and its interval; unions have no threat model."""
    cells = {key: row[key] for key in ("norm", "eps", "n", "accuracy", "ci_low", "ci_high")}
    return {key: _known(cell) for key, cell in cells.items()} | {"audit": row["audit"] or None}


def _known(cell: Any) -> Any:
    unknown = cell == "" or (isinstance(cell, float) and math.isnan(cell))
    return None if unknown else cell
