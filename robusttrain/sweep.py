"""Sweeps: what a job does beside its run, and what is made of all jobs at the end."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from robusttrain.errors import InputError
from robusttrain.refusals import FORESEEN, explain
from robusttrain.report import jobs
from robusttrain.report.jobs import FAILED, FINISHED, RUNNING, WAITING, Job
from robusttrain.report.summary import SUMMARY, write_summary
from robusttrain.report.terminal import Terminal
from robusttrain.run_directory import MANIFEST, PREAMBLE


class Sweeps(Callback):
    """Tells the process that was started by the user where its sweep lies.

    Hydra's own notice of the end does not come where a job has failed or the user has stopped the
    sweep, which are the times when a summary is wanted most.
    """

    directory: ClassVar[Path | None] = None
    planned: ClassVar[list[Job]] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called once, before any job."""
        Sweeps.directory = Path(config.hydra.sweep.dir).absolute()
        Sweeps.planned = _planned(config)


def recorded(
    chosen: HydraConf, config: DictConfig, run: Callable[[], float | None], terminal: Terminal
) -> float | None:
    """Run one job of a sweep, unless it has finished before, and record what became of it.

    Nothing is kept in memory: jobs may run in processes of their own, on other machines too.

    Raises
    ------
    InputError
        If the directory of the job holds results of another configuration.
    """
    run_dir = Path(chosen.runtime.output_dir)
    sweep_dir = Path(chosen.sweep.dir).absolute()
    job = _job(chosen, config, run_dir.relative_to(sweep_dir))
    before = jobs.read_job(sweep_dir, job.folder)
    title = f"job {job.number}"
    try:
        if before is not None and _is_done(before, job, run_dir):
            terminal.say(f"{title} has finished before: {_words(job)}")
            return before.result
        _refuse_to_mix(before, job, run_dir)
        terminal.say(f"{title}: {_words(job)}")
        _keep_in_view(job, sweep_dir, terminal)
        ended = _ended(job, run, sweep_dir)
    except Exception as error:
        # The sweep goes on with its other jobs; at its end Hydra raises its first failure again.
        print(f"robusttrain: {title} failed: {explain(error)}", file=sys.stderr)
        raise
    reported = {row["attack"]: float(row["accuracy"]) for row in jobs.report(sweep_dir, ended)}
    terminal.figures(
        f"{title} finished",
        clean=reported.get("clean"),
        robust=reported.get("worst_case"),
        seconds=ended.seconds,
    )
    terminal.say(str(run_dir))
    return ended.result


def conclude(terminal: Terminal) -> None:
    """Write what the sweep of this process has come to, if it was one and any job has started."""
    folder, Sweeps.directory = Sweeps.directory, None
    ended = jobs.read_jobs(folder) if folder else []
    if folder is None or not ended:
        return
    jobs.write_table(folder)
    overview = write_summary(folder, ended)
    if not overview.empty:
        shown = overview[[name for name in overview.columns if ", over " not in name]]
        terminal.table(shown, "means over seeds, in percent", {"seeds", "clean", "worst case"})
    finished = sum(job.status == FINISHED for job in ended)
    terminal.say(f"{finished} of {len(ended)} jobs have finished")
    for name in (jobs.TABLE, SUMMARY):
        terminal.say(str(folder / name))


def _planned(config: DictConfig) -> list[Job]:
    """All jobs of a sweep over a grid; none where only the sweeper knows what comes next."""
    if not str(config.hydra.sweeper["_target_"]).endswith(".BasicSweeper"):
        return []
    given = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    grid: dict[str, list[str]] = {}
    try:
        for one in OverridesParser.create().parse_overrides(given + config.hydra.overrides.task):
            key = one.get_key_element()
            values = one.sweep_string_iterator() if one.is_sweep_override() else [_value(one)]
            grid[key] = [f"{key}={value}" for value in values]
    except HydraException:
        # A pattern such as defense=glob(*) needs to be looked up; what is wrong, Hydra will say.
        return []
    combinations = enumerate(product(*grid.values()))
    return [Job(number, "", words, WAITING) for number, words in combinations]


def _words(job: Job) -> str:
    """What sets a job apart from those that are planned, as far as that is known."""
    varying = [f"{key}={job.settings.get(key, '')}" for key in jobs.varying(Sweeps.planned)]
    return " ".join(varying or job.overrides)


def _value(override: Override) -> str:
    return override.get_value_element_as_str()


def _keep_in_view(job: Job, sweep_dir: Path, terminal: Terminal) -> None:
    """A table of all jobs above the bars of this one, with those that are still to come."""
    known = {one.number: one for one in [*Sweeps.planned, *jobs.read_jobs(sweep_dir)]}
    known[job.number] = replace(job, status=RUNNING)
    shown = [known[number] for number in sorted(known)]
    cells = jobs.overview(sweep_dir, shown)
    figures = {"job", "clean", "worst case", "seconds"}
    terminal.keep_in_view(cells, figures, shown.index(known[job.number]))


def _job(chosen: HydraConf, config: DictConfig, folder: Path) -> Job:
    place = Path(chosen.runtime.output_dir) / str(chosen.output_subdir)
    written = {str(path): path.read_text() for path in place.glob("*.yaml")}
    return Job(
        int(chosen.job.num), str(folder), tuple(chosen.overrides.task),
        config=OmegaConf.to_yaml(config), hydra=written,
    )  # fmt: skip


def _is_done(before: Job, job: Job, run_dir: Path) -> bool:
    same = before.config == job.config
    return before.status == FINISHED and same and (run_dir / MANIFEST).is_file()


def _refuse_to_mix(before: Job | None, job: Job, run_dir: Path) -> None:
    """Refuse to write among the results of another configuration.

    Hydra has replaced its files about the run by then; they are put back.
    """
    if not {path.name for path in run_dir.iterdir()} - PREAMBLE:
        return
    owner = "an unknown job"
    if before is not None:
        if before.config == job.config:
            return
        owner = f"another job ({' '.join(before.overrides)})"
        for path, content in before.hydra.items():
            Path(path).write_text(content)
    raise InputError(
        f"{run_dir} holds results of {owner}, which {_words(job)} would mix with: "
        "give another hydra.sweep.dir, or remove that directory"
    )


def _ended(job: Job, run: Callable[[], float | None], sweep_dir: Path) -> Job:
    """The job after it has run, as it also stands in its record; a failure stands there alone."""
    job.save(sweep_dir)
    started = time.perf_counter()
    try:
        ended = replace(job, status=FINISHED, result=run())
    except Exception as error:
        _keep(replace(job, status=FAILED, error=_line(error)), started, sweep_dir)
        raise
    return _keep(ended, started, sweep_dir)


def _keep(job: Job, started: float, sweep_dir: Path) -> Job:
    timed = replace(job, seconds=time.perf_counter() - started)
    timed.save(sweep_dir)
    jobs.write_table(sweep_dir)
    return timed


def _line(error: Exception) -> str:
    message = " ".join(explain(error).split())
    return message if isinstance(error, FORESEEN) else f"{type(error).__name__}: {message}"
