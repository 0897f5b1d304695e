"""The jobs of a sweep: the record that each one leaves, and `sweep.csv`, made of all of them."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from robusttrain import renames
from robusttrain.report.files import write_csv, write_json
from robusttrain.run_directory import JOB_OUTPUT, RECORDS, REPORT, SWEEP_TABLE

# While a job runs it is unfinished, and stays that where it was killed.
UNFINISHED, FINISHED, FAILED = "unfinished", "finished", "failed"
# These two are never on disk.
WAITING, RUNNING = "waiting", "running"

# Columns of `report.csv`, and what they are called in `sweep.csv`: there, `eps` is the job's.
FIGURES = {
    "attack": "attack",
    "norm": "attack_norm",
    "eps": "attack_eps",
    "n": "n",
    "accuracy": "accuracy",
    "ci_low": "ci_low",
    "ci_high": "ci_high",
}
OWN = ("job", *FIGURES.values(), "validation", "status", "seconds", "error")


@dataclass(frozen=True)
class Job:
    """What is known of one job.

    Parameters
    ----------
    number
        Its position in the sweep.
    folder
        Its directory, relative to that of the sweep.
    overrides
        Its command line, as `key=value` words.
    status
        `unfinished`, `finished` or `failed`.
    seconds
        How long it took, once it has ended.
    result
        What it returned to the sweeper.
    error
        Why it failed, in one line.
    config
        Its whole configuration, as text: two jobs are the same if they have the same one.
    hydra
        The files that Hydra wrote about it, by path.
    """

    number: int
    folder: str
    overrides: tuple[str, ...]
    status: str = UNFINISHED
    seconds: float | None = None
    result: float | None = None
    error: str = ""
    config: str = ""
    hydra: Mapping[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, str]:
        """The values of its command line, by key."""
        words = (word.partition("=") for word in self.overrides)
        return {key.lstrip("+~"): value for key, _, value in words}

    def save(self, sweep_dir: Path) -> None:
        """Write the record of this job, in place of an older one."""
        (sweep_dir / RECORDS).mkdir(exist_ok=True)
        write_json(_record(sweep_dir, self.folder), asdict(self))


def read_job(sweep_dir: Path, folder: str) -> Job | None:
    """The record of the job in `folder`, if it has left one."""
    path = _record(sweep_dir, folder)
    return _read(path) if path.is_file() else None


def read_jobs(sweep_dir: Path) -> list[Job]:
    """All jobs that have started, by their numbers."""
    found = (sweep_dir / RECORDS).glob("*.json")
    return sorted(map(_read, found), key=lambda job: job.number)


def job_output(sweep_dir: Path, folder: str) -> Path:
    """Where the job in `folder` says what the user is to know, if it has no terminal."""
    return _record(sweep_dir, folder).with_suffix(JOB_OUTPUT)


def job_outputs(sweep_dir: Path) -> list[Path]:
    """What all jobs have said, in the order of their names."""
    return sorted((sweep_dir / RECORDS).glob(f"*{JOB_OUTPUT}"))


def record_of(run_dir: Path) -> tuple[Path, Job] | None:
    """The directory of the sweep that a run belongs to, and its record there."""
    for sweep_dir in run_dir.parents:
        job = read_job(sweep_dir, str(run_dir.relative_to(sweep_dir)))
        if job is not None:
            return sweep_dir, job
    return None


def varying(jobs: Sequence[Job]) -> list[str]:
    """The keys that not all jobs have the same value of, in the order of the command line."""
    keys = dict.fromkeys(key for job in jobs for key in job.settings)
    return [key for key in keys if len({job.settings.get(key) for job in jobs}) > 1]


def report(sweep_dir: Path, job: Job) -> list[dict[str, str]]:
    """The rows of a finished job's `report.csv`; none where nothing was evaluated."""
    path = sweep_dir / job.folder / REPORT
    if job.status != FINISHED or not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(sweep_dir: Path, jobs: Sequence[Job]) -> pd.DataFrame:
    """`sweep.csv`: a row for each job and attack, and one for a job that has no figures.

    Of the keys, only those that vary are columns, with values as they were given; one that has the
    name of another column is called `config.<key>`. `seconds` are those of the whole job,
    `validation` is what it returned: the robust accuracy on its validation split.
    """
    keys = varying(jobs)
    names = {key: f"config.{key}" if key in OWN else key for key in keys}
    columns = ["job", *names.values(), *OWN[1:]]
    rows = [row for job in jobs for row in _rows(sweep_dir, job, names)]
    return pd.DataFrame(rows, columns=columns)


def overview(sweep_dir: Path, jobs: Sequence[Job]) -> pd.DataFrame:
    """A line of text for each job: what sets it apart, how it stands, and its accuracies."""
    keys = varying(jobs)
    rows = []
    for job in jobs:
        found = {row["attack"]: f"{float(row['accuracy']):.2%}" for row in report(sweep_dir, job)}
        rows.append(
            {"job": str(job.number), **{key: job.settings.get(key, "") for key in keys}}
            | {"status": job.status}
            | {name: found.get(name.replace(" ", "_"), "") for name in ("clean", "worst case")}
            | {"seconds": "" if job.seconds is None else f"{job.seconds:.0f}"}
        )
    return pd.DataFrame(rows)


def write_table(sweep_dir: Path) -> None:
    """Write `sweep.csv` from what lies in the directory.

    Jobs may end at once in several processes. Each writes the whole table and then looks again, so
    that whoever writes last has seen every record that was there before.
    """
    written: list[Job] | None = None
    while (jobs := read_jobs(sweep_dir)) != written:
        write_csv(sweep_dir / SWEEP_TABLE, table(sweep_dir, jobs))
        written = jobs


def _rows(sweep_dir: Path, job: Job, names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    settings = {name: job.settings.get(key, "") for key, name in names.items()}
    outcome = {"validation": job.result, "status": job.status}
    outcome |= {"seconds": job.seconds, "error": job.error}
    for row in report(sweep_dir, job) or [{}]:
        figures = {name: row.get(key, "") for key, name in FIGURES.items()}
        yield {"job": job.number} | settings | figures | outcome


def _record(sweep_dir: Path, folder: str) -> Path:
    # Jobs may lie deeper than one level (hydra.sweep.subdir), their records do not.
    return sweep_dir / RECORDS / f"{folder.replace('/', '%2F')}.json"


def _read(path: Path) -> Job:
    content = json.loads(path.read_text())
    overrides = tuple(map(renames.override, content["overrides"]))
    return Job(**content | {"overrides": overrides, "config": renames.yaml(content["config"])})
