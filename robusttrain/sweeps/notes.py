"""What readers of a sweep should know of single jobs: warnings, failures, and missing figures."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from robusttrain.report.files import intact
from robusttrain.run_directory import RESULT
from robusttrain.sweeps import records
from robusttrain.sweeps.records import FAILED, FINISHED, UNFINISHED, Job

# Verdicts of an audit that readers should know.
DOUBTS = ("warn", "fail")


def notes(sweep_dir: Path, jobs: Sequence[Job]) -> dict[str, pd.DataFrame]:
    """Tables of the jobs that are flagged, failed, unfinished or without figures, by heading."""

    def is_empty(job: Job) -> list[str]:
        found = job.status == FINISHED and not records.report(sweep_dir, job)
        return ["nothing was evaluated"] if found else []

    reasons: dict[str, Callable[[Job], list[str]]] = {
        "Flagged": lambda job: flags(sweep_dir, job),
        "Failed": lambda job: [job.error] if job.status == FAILED else [],
        "Unfinished": lambda job: [job.status] if job.status == UNFINISHED else [],
        "Without figures": is_empty,
    }
    keys = records.varying(jobs)
    tables = {
        heading: [_row(job, keys, words) for job in jobs for words in reason(job)]
        for heading, reason in reasons.items()
    }
    return {heading: pd.DataFrame(rows) for heading, rows in tables.items() if rows}


def flags(sweep_dir: Path, job: Job) -> list[str]:
    """What is doubtful about a job: its audit, its training, and requirements that it misses."""
    rows = records.report(sweep_dir, job)
    found = [
        f"audit: {row['audit']} ({' '.join(_named(row))})"
        for row in rows
        if row.get("audit") in DOUBTS
    ]
    return [*found, *_of_result(sweep_dir / job.folder)]


def _named(row: dict[str, str]) -> Iterator[str]:
    yield row["attack"].replace("_", " ")
    if row["norm"]:
        yield f"{row['norm']} {row['eps']}"


def _of_result(run_dir: Path) -> list[str]:
    """The problems of a training and the unmet requirements; runs of earlier versions have none."""
    path = run_dir / RESULT
    if not path.is_file():
        return []
    with intact(path):
        result = json.loads(path.read_text())
        findings = (result["training"] or {}).get("findings", [])
        problems = [f"{one['problem']} in epoch {one['epoch']}" for one in findings]
        unmet = [one for one in result["requirements"] if not one["met"]]
        return problems + [_required(one) for one in unmet]


def _required(one: dict[str, Any]) -> str:
    found = (one["value"], one["required"])
    value, required = (f"{x:.1%}" if isinstance(x, float) else x for x in found)
    return f"{one['figure'].replace('_', ' ')} is {value}, but {one['key']} requires {required}"


def _row(job: Job, keys: Sequence[str], words: str) -> dict[str, str]:
    values = {key: job.settings.get(key, "") for key in keys}
    return {"job": str(job.number), **values, "reason": words}
