"""Sweeps: what a job does beside its run, and what is made of all jobs at the end."""

import copy
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from robusttrain.config.error_messages import EXPECTED_ERRORS, explain
from robusttrain.errors import InputError, JobError
from robusttrain.report.terminal import Terminal
from robusttrain.run_directory import (
    COMMAND,
    LOG,
    MANIFEST,
    PREAMBLE,
    SUMMARY,
    SWEEP_TABLE,
)
from robusttrain.runtime import signals
from robusttrain.runtime.signals import Interrupted
from robusttrain.sweeps import records
from robusttrain.sweeps.monitor import COMPLAINT, FIGURES
from robusttrain.sweeps.records import FAILED, FINISHED, RUNNING, UNFINISHED, Job
from robusttrain.sweeps.session import SweepState, opened, present
from robusttrain.sweeps.summary import write_summary

log = logging.getLogger("robusttrain")


Run = Callable[[DictConfig, Terminal], float | None]
"""(configuration, where it reports) -> the figure that the sweeper gets."""


def job(chosen: HydraConf, config: DictConfig, run: Run) -> float | None:
    """`recorded`, in the process of the user or in one of the launcher."""
    session = present()
    assert session is not None, "the command line or the callback opens it"
    assert session.sweep is not None, "Hydra announces a sweep before its jobs"
    if not session.elsewhere:
        terminal = Terminal()
        return recorded(session.sweep, chosen, config, lambda c: run(c, terminal), terminal)
    # Several at once would write over each other; the log has what a job says.
    silent = Terminal(Console(quiet=True, force_terminal=False))
    with _elsewhere(chosen, session.sweep.directory) as terminal:
        return recorded(
            session.sweep, chosen, config, lambda c: run(c, silent), terminal, elsewhere=True
        )


def recorded(
    sweep: SweepState,
    chosen: HydraConf,
    config: DictConfig,
    run: Callable[[DictConfig], float | None],
    terminal: Terminal,
    *,
    elsewhere: bool = False,
) -> float | None:
    """Run one job of a sweep, unless it has finished before, and record what became of it.

    Nothing is kept in memory: jobs may run in processes of their own, on other machines too.

    Parameters
    ----------
    sweep
        Which it is a job of.
    chosen, config
        Hydra's part of its configuration, and the user's.
    run
        Does the work; it is given the configuration, with `resume` set where the job goes on.
    terminal
        Where the job says how it stands.
    elsewhere
        Whether that is no terminal of the user.

    Raises
    ------
    InputError
        If the directory of the job holds results of another configuration.
    """
    run_dir = Path(chosen.runtime.output_dir)
    job = _job(chosen, config, run_dir.relative_to(sweep.directory))
    before = records.read_job(sweep.directory, job.folder)
    title, words = f"job {job.number}", _words(job, sweep.keys)
    try:
        if before is not None and _is_done(before, job, run_dir):
            terminal.say(f"{title} has finished before: {words}")
            return before.result
        _refuse_to_mix(before, job, run_dir, words)
        goes_on = _goes_on(before, job, run_dir)
        terminal.say(f"{title}{' resumes' if goes_on else ''}: {words}")
        if goes_on:
            config = _resuming(config, run_dir)
        if not elsewhere:
            _keep_in_view(job, sweep, terminal)
        ended = _ended(job, lambda: run(config), sweep.directory)
    except Exception as error:
        # The sweep goes on with its other jobs; at its end Hydra raises its first failure again.
        complaint = f"{COMPLAINT}{title} failed: {explain(error)}"
        if elsewhere:
            terminal.say(complaint)
        else:
            print(complaint, file=sys.stderr)
        raise
    _tell_end(ended, run_dir, sweep.directory, terminal)
    return ended.result


def _tell_end(job: Job, run_dir: Path, sweep_dir: Path, terminal: Terminal) -> None:
    accuracies = dict(zip(("clean", "robust"), records.quoted(sweep_dir, job), strict=False))
    terminal.figures(f"job {job.number} finished", **accuracies, seconds=job.seconds)
    terminal.say(str(run_dir))


@contextmanager
def concluded() -> Iterator[None]:
    """Write what the sweep that runs within the block has come to, if it is one.

    Raises
    ------
    JobError
        If what runs the jobs, or chooses them, ends with an error of its own.
    Interrupted
        If a signal came that was put off until the jobs had ended.
    """
    with opened() as session:
        try:
            yield
        except EXPECTED_ERRORS:
            raise
        except Exception as error:
            engine = session.sweep.engine if session.sweep else ""
            if not engine:
                raise
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise JobError(f"{engine} ended with {type(error).__name__}: {first}") from error
        finally:
            session.view.close()
            if session.sweep is not None:
                _conclude(session.sweep, Terminal())
            signals.raise_pending()


def finish(run_dir: Path, result: float | None, seconds: float) -> None:
    """Update the sweep's records after one of its jobs was resumed on its own."""
    found = records.record_of(run_dir)
    if found is None:
        return
    sweep_dir, job = found
    ended = replace(job, status=FINISHED, result=result, error="", seconds=seconds)
    ended.save(sweep_dir)
    records.write_table(sweep_dir)
    write_summary(sweep_dir, records.read_jobs(sweep_dir))


def _conclude(sweep: SweepState, terminal: Terminal) -> None:
    """Write what a sweep has come to, if any of its jobs has started."""
    folder = sweep.directory
    ended = records.read_jobs(folder)
    if not ended:
        return
    records.write_table(folder)
    overview = write_summary(folder, ended)
    if not overview.empty:
        shown = overview[[name for name in overview.columns if ", over " not in name]]
        terminal.table(shown, "means over seeds, in percent", {"seeds", "clean", "worst case"})
    if sweep.maximises:
        _tell_best(ended, sweep.keys, terminal)
    finished = sum(job.status == FINISHED for job in ended)
    terminal.say(f"{finished} of {len(ended)} jobs have finished")
    for name in (SWEEP_TABLE, SUMMARY):
        terminal.say(str(folder / name))


def _tell_best(ended: Sequence[Job], keys: Sequence[str], terminal: Terminal) -> None:
    found = [(job.result, job) for job in ended if job.result is not None]
    if found:
        result, job = max(found, key=lambda pair: pair[0])
        where = f"job {job.number}, {_words(job, keys)}"
        terminal.figures(f"best on the validation split: {where}", robust=result)


@contextmanager
def _elsewhere(chosen: HydraConf, sweep_dir: Path) -> Iterator[Terminal]:
    """A job in a process of the launcher.

    What it says goes to a file, for the process of the user to pass on, and of a failure only the
    message goes back: an exception of any kind may not outlive the way.
    """
    run_dir = Path(chosen.runtime.output_dir)
    with records.job_output(sweep_dir, str(run_dir.relative_to(sweep_dir))).open("a") as file:
        terminal = Terminal(Console(file=file, highlight=False, soft_wrap=True))
        begun = False
        try:
            with signals.handle_in_worker():
                begun = True
                yield terminal
        except Interrupted as interrupted:
            if begun:
                terminal.say(f"job {chosen.job.num} was stopped by {interrupted}")
            if str(chosen.runtime.choices["hydra/launcher"]) == "joblib":
                # Others may be at work still, which would be killed if this process left.
                raise JobError(f"stopped by {interrupted}") from interrupted
            sys.exit(128 + interrupted.signum)
        except EXPECTED_ERRORS as error:
            raise JobError(explain(error)) from error
        except Exception as error:
            log.exception("a defect")
            where = run_dir / LOG
            raise JobError(f"{_line(error)} ({where} has the traceback)") from error


def _words(job: Job, keys: Sequence[str]) -> str:
    """What sets a job apart from the others, whose `keys` vary as far as that is known."""
    varying = [f"{key}={job.settings.get(key, '')}" for key in keys]
    return " ".join(varying or job.overrides)


def _keep_in_view(job: Job, sweep: SweepState, terminal: Terminal) -> None:
    """A table of all jobs above the bars of this one, with those that are still to come."""
    known = {one.number: one for one in [*sweep.planned, *records.read_jobs(sweep.directory)]}
    known[job.number] = replace(job, status=RUNNING)
    shown = [known[number] for number in sorted(known)]
    cells = records.overview(sweep.directory, shown)
    terminal.keep_in_view(cells, FIGURES, shown.index(known[job.number]))


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


def _goes_on(before: Job | None, job: Job, run_dir: Path) -> bool:
    """Whether the job was killed or stopped, so that it can be gone on with where it was."""
    same = before is not None and before.config == job.config and before.status == UNFINISHED
    return same and (run_dir / COMMAND).is_file()


def _resuming(config: DictConfig, run_dir: Path) -> DictConfig:
    """The configuration of a job that goes on in its directory."""
    resuming = copy.deepcopy(config)
    resuming.resume = str(run_dir)
    return resuming


def _refuse_to_mix(before: Job | None, job: Job, run_dir: Path, words: str) -> None:
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
    problem = f"holds results of {owner}, which {words} would mix with"
    allowed = "give another hydra.sweep.dir, or remove that directory"
    raise InputError(str(run_dir), allowed=allowed, problem=problem)


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
    records.write_table(sweep_dir)
    return timed


def _line(error: Exception) -> str:
    message = " ".join(explain(error).split())
    return message if isinstance(error, EXPECTED_ERRORS) else f"{type(error).__name__}: {message}"
