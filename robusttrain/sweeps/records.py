"""The records of the jobs of a sweep, and `sweep.csv`, which is made from them."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from robusttrain import renames
from robusttrain.errors import InputError
from robusttrain.report.files import intact, write_csv, write_json
from robusttrain.report.identity import refuse_mixed
from robusttrain.run_directory import JOB_OUTPUT, MANIFEST, RECORDS, REPORT, SWEEP_TABLE
from robusttrain.sweeps.trained import CHECKPOINT, Evaluated, distinguished

# The status in a record. A job that runs, or was killed, is unfinished.
UNFINISHED, FINISHED, FAILED = "unfinished", "finished", "failed"
# The status that only the table in the terminal shows.
WAITING, RUNNING = "waiting", "running"

# Units of time, in seconds. One is used from two of it on.
UNITS = (("h", 3600), ("min", 60), ("s", 1))

# Columns of `report.csv`, and their names in `sweep.csv`, where `eps` is a key of the job.
FIGURES = {
    "attack": "attack",
    "norm": "attack_norm",
    "eps": "attack_eps",
    "n": "n",
    "accuracy": "accuracy",
    "ci_low": "ci_low",
    "ci_high": "ci_high",
    "audit": "audit",
}
# Figures of the cost of each stage in `manifest.json`, by their columns.
COSTS = {
    f"{stage}_{figure}": (stage, figure)
    for stage in ("training", "evaluation")
    for figure in ("images_per_second", "passes", "peak_memory_mib")
}
OWN = ("job", *FIGURES.values(), "validation", *COSTS, "status", "seconds", "error")


@dataclass(frozen=True)
class Job:
    """The record of a job.

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
        Its duration, once it has ended.
    result
        The figure that it returned to the sweeper.
    error
        Why it failed, in one line.
    config
        Its whole configuration as text. Jobs with the same configuration are the same job.
    hydra
        The contents of the files that Hydra wrote for it, by name.
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
        """Write the record; it replaces an older one."""
        (sweep_dir / RECORDS).mkdir(exist_ok=True)
        write_json(_record(sweep_dir, self.folder), asdict(self))


def read_job(sweep_dir: Path, folder: str) -> Job | None:
    """The record of the job in `folder`, if there is one."""
    path = _record(sweep_dir, folder)
    return _read(path) if path.is_file() else None


def read_jobs(sweep_dir: Path) -> list[Job]:
    """The records of all jobs that have started, in the order of their numbers."""
    found = (sweep_dir / RECORDS).glob("*.json")
    return sorted(map(_read, found), key=lambda job: job.number)


def job_output(sweep_dir: Path, folder: str) -> Path:
    """The file for the output of the job in `folder`, if it has no terminal."""
    return _record(sweep_dir, folder).with_suffix(JOB_OUTPUT)


def job_outputs(sweep_dir: Path) -> list[Path]:
    """The output files of all jobs, in the order of their names."""
    return sorted((sweep_dir / RECORDS).glob(f"*{JOB_OUTPUT}"))


def record_of(run_dir: Path) -> tuple[Path, Job] | None:
    """The directory of the sweep that a run belongs to, and its record there."""
    for sweep_dir in run_dir.parents:
        job = read_job(sweep_dir, str(run_dir.relative_to(sweep_dir)))
        if job is not None:
            return sweep_dir, job
    return None


def varying(jobs: Sequence[Job]) -> list[str]:
    """The keys whose values differ between jobs, in the order of the command line."""
    keys = dict.fromkeys(key for job in jobs for key in job.settings)
    return [key for key in keys if len({job.settings.get(key) for job in jobs}) > 1]


def trained(sweep_dir: Path, jobs: Sequence[Job]) -> dict[str, dict[str, str]]:
    """What distinguishes the models that a sweep evaluates again, by the folders of its jobs.

    It is empty if the sweep has one checkpoint or none; see `distinguished`.
    """
    if CHECKPOINT not in varying(jobs):
        return {}
    given = {key for job in jobs for key in job.settings}
    evaluated = {
        job.folder: Evaluated(
            job.settings.get(CHECKPOINT, ""), _mapping(manifest(sweep_dir, job).get("trained"))
        )
        for job in jobs
    }
    return distinguished(evaluated, given)


def manifest(sweep_dir: Path, job: Job) -> dict[str, Any]:
    """The manifest of a finished job; empty if there is none, or if it is damaged.

    The table is written after every job, which must not fail for the manifest of another one.
    `report` refuses a damaged manifest if there are results beside it.
    """
    path = sweep_dir / job.folder / MANIFEST
    if job.status != FINISHED or not path.is_file():
        return {}
    try:
        return _mapping(json.loads(path.read_text()))
    except ValueError:
        return {}


def report(sweep_dir: Path, job: Job) -> list[dict[str, str]]:
    """The rows of a finished job's `report.csv`; none if nothing was evaluated.

    Raises
    ------
    InputError
        If the directory of the job has a report of another run, or is that of another job.
    """
    run_dir = sweep_dir / job.folder
    if job.status != FINISHED or not (run_dir / REPORT).is_file():
        return []
    refuse_mixed(run_dir, [REPORT])
    _refuse_other(run_dir, job)
    with (run_dir / REPORT).open(newline="") as file:
        return list(csv.DictReader(file))


def refuse_exchanged(sweep_dir: Path) -> None:
    """Raise `InputError` if a finished job of the sweep has a report of another run or job."""
    for job in read_jobs(sweep_dir):
        report(sweep_dir, job)


def _refuse_other(run_dir: Path, job: Job) -> None:
    """Refuse a directory whose run has another command than the record of its job."""
    path = run_dir / MANIFEST
    if not path.is_file():
        return
    with intact(path):
        manifest = json.loads(path.read_text())
        # Earlier versions, which do not identify files either, wrote references as their values.
        is_known = isinstance(manifest.get("files"), dict)
        words = manifest["overrides"] if is_known else job.overrides
        other = {*job.overrides} - set(map(renames.override, words))
    if other:
        allowed = f"its record has {' '.join(sorted(other))}; put it back, or remove it"
        raise InputError(str(run_dir), allowed=allowed, problem="is the run of another job")


def quoted(sweep_dir: Path, job: Job) -> tuple[float, ...]:
    """The clean accuracy of a finished job and the worst case of all its attacks, if it has any.

    Rows between them may be empty: those of single threat models if the union alone was counted.
    """
    rows = report(sweep_dir, job)
    return tuple(float(rows[place]["accuracy"]) for place in (0, -1)) if rows else ()


def table(sweep_dir: Path, jobs: Sequence[Job]) -> pd.DataFrame:
    """The table of `sweep.csv`: a row for each job and attack, or one for a job without figures.

    Keys that vary are columns, with values as they were given; a key with the name of another
    column is called `config.<key>`. So are the keys that distinguish trained models. `seconds` is
    the duration of the whole job, `validation` is its result, the robust accuracy on its validation
    split, and the cost of its stages is that of its manifest.
    """
    models = trained(sweep_dir, jobs)
    cells = {job.folder: models.get(job.folder, {}) | job.settings for job in jobs}
    of_models = (key for model in models.values() for key in model)
    keys = list(dict.fromkeys([*of_models, *varying(jobs)]))
    names = {key: f"config.{key}" if key in OWN else key for key in keys}
    columns = ["job", *names.values(), *OWN[1:]]
    rows = [row for job in jobs for row in _rows(sweep_dir, job, cells[job.folder], names)]
    return pd.DataFrame(rows, columns=columns)


def overview(sweep_dir: Path, jobs: Sequence[Job]) -> pd.DataFrame:
    """A row of text for each job: its values of the varying keys, status and accuracies."""
    keys = varying(jobs)
    rows = []
    for job in jobs:
        accuracies = [f"{share:.2%}" for share in quoted(sweep_dir, job)] or ["", ""]
        rows.append(
            {"job": str(job.number), **{key: job.settings.get(key, "") for key in keys}}
            | {"status": job.status}
            | dict(zip(("clean", "worst case"), accuracies, strict=True))
            | {"seconds": "" if job.seconds is None else f"{job.seconds:.0f}"}
        )
    return pd.DataFrame(rows)


def time_left(jobs: Sequence[Job]) -> str:
    """How long the jobs that have not ended will take together, by the mean of those finished.

    Empty if none has finished, or all have ended.
    """
    seconds = [job.seconds for job in jobs if job.status == FINISHED and job.seconds is not None]
    remaining = sum(job.status not in (FINISHED, FAILED) for job in jobs)
    if not seconds or not remaining:
        return ""
    at_once = max(1, sum(job.status == RUNNING for job in jobs))
    left = fmean(seconds) * remaining / at_once
    unit, size = next((unit, size) for unit, size in UNITS if left >= 2 * size or size == 1)
    return f"about {left / size:.0f} {unit} left"


def counted(jobs: Sequence[Job], planned: int, unfinished: str = "stopped") -> str:
    """How the jobs of a sweep have ended, of which `planned` are known."""
    count = Counter(job.status for job in jobs)
    total = max(planned, len(jobs))
    finished = f"{count[FINISHED]} of {total} jobs {'has' if count[FINISHED] == 1 else 'have'}"
    others = {
        "failed": count[FAILED],
        unfinished: count[UNFINISHED],
        "not started": total - len(jobs),
    }
    named = [f"{number} {status}" for status, number in others.items() if number]
    return ", ".join([f"{finished} finished", *named])


def write_table(sweep_dir: Path) -> None:
    """Write `sweep.csv` from the records in the directory.

    Several processes may write it at once. Each one writes the whole table until the records have
    not changed meanwhile, so that the last table contains every record.
    """
    written: list[Job] | None = None
    while (jobs := read_jobs(sweep_dir)) != written:
        write_csv(sweep_dir / SWEEP_TABLE, table(sweep_dir, jobs))
        written = jobs


def _rows(
    sweep_dir: Path, job: Job, cells: Mapping[str, str], names: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    settings = {name: cells.get(key, "") for key, name in names.items()}
    cost = _mapping(manifest(sweep_dir, job).get("cost"))
    costs = {name: _mapping(cost.get(stage)).get(key) for name, (stage, key) in COSTS.items()}
    outcome = {"validation": job.result, **costs, "status": job.status}
    outcome |= {"seconds": job.seconds, "error": job.error}
    for row in report(sweep_dir, job) or [{}]:
        figures = {name: row.get(key, "") for key, name in FIGURES.items()}
        yield {"job": job.number} | settings | figures | outcome


def _mapping(content: Any) -> dict[str, Any]:
    """An object of a JSON file; empty if it is something else."""
    return content if isinstance(content, dict) else {}


def _record(sweep_dir: Path, folder: str) -> Path:
    # A job may lie several levels deep (hydra.sweep.subdir); its record does not.
    return sweep_dir / RECORDS / f"{folder.replace('/', '%2F')}.json"


def _read(path: Path) -> Job:
    with intact(path):
        content = json.loads(path.read_text())
        overrides = tuple(map(renames.override, content["overrides"]))
        return Job(**content | {"overrides": overrides, "config": renames.yaml(content["config"])})
