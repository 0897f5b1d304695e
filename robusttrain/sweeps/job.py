"""The jobs of a sweep: run, record, skip and resume them, and summarise them at the end."""

import copy
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from robusttrain.config.error_messages import EXPECTED_ERRORS, explain
from robusttrain.errors import InputError, JobError
from robusttrain.exit_codes import ExitCode, of_signal
from robusttrain.report.page import Page
from robusttrain.report.terminal import Terminal
from robusttrain.report.verbosity import Verbosity
from robusttrain.run_directory import (
    COMMAND,
    LOG,
    MANIFEST,
    OF_SWEEP,
    PAIRS,
    PREAMBLE,
    SUMMARY,
    SWEEP_PAGE,
    SWEEP_TABLE,
)
from robusttrain.runs import outcome
from robusttrain.runs.lock import refuse_in_use
from robusttrain.runs.resume import as_given
from robusttrain.runs.run_directories import remove_if_untouched, without_output
from robusttrain.runtime import distributed, signals
from robusttrain.runtime.signals import Interrupted
from robusttrain.sweeps import records
from robusttrain.sweeps.monitor import COMPLAINT, FIGURES
from robusttrain.sweeps.pairs import Comparison
from robusttrain.sweeps.records import FAILED, FINISHED, RUNNING, UNFINISHED, Job
from robusttrain.sweeps.session import SweepState, present
from robusttrain.sweeps.summary import write_summary

log = logging.getLogger("robusttrain")


# The key of a sweep's directory, which holds the records of its jobs.
PLACE = "hydra.sweep.dir="

Run = Callable[[DictConfig, Terminal], float | None]
"""(configuration, terminal) -> the figure that the sweeper gets."""


def job(chosen: HydraConf, config: DictConfig, run: Run) -> float | None:
    """Run a job of the current sweep, in the user's process or in a worker of the launcher."""
    session = present()
    assert session is not None, "the command line or the callback opens it"
    assert session.sweep is not None, "Hydra announces a sweep before its jobs"
    if not session.in_worker:
        terminal = Terminal(verbosity=Verbosity(config.verbosity))
        return recorded(session.sweep, chosen, config, lambda c: run(c, terminal), terminal)
    # The output of several runs at once would be mixed up; the log of each run has its own.
    silent = Terminal(Console(quiet=True, force_terminal=False))
    with _in_worker(chosen, session.sweep.directory) as terminal:
        return recorded(
            session.sweep, chosen, config, lambda c: run(c, silent), terminal, in_worker=True
        )


def recorded(
    sweep: SweepState,
    chosen: HydraConf,
    config: DictConfig,
    run: Callable[[DictConfig], float | None],
    terminal: Terminal,
    *,
    in_worker: bool = False,
) -> float | None:
    """Run one job of a sweep, unless it has already finished, and record its outcome.

    All state is on disk, since jobs may run in other processes and on other machines.

    Parameters
    ----------
    sweep
        The sweep of the job.
    chosen, config
        Hydra's part of the configuration, and the user's.
    run
        Does the work; it gets the configuration, with `resume` set if the job resumes.
    terminal
        The terminal for the status of the job.
    in_worker
        Whether the job runs in a worker of the launcher, without the user's terminal.

    Raises
    ------
    InputError
        If the directory of the job holds results of another configuration, or another process
        runs there.
    """
    run_dir = Path(chosen.runtime.output_dir)
    job = _job(chosen, config, run_dir.relative_to(sweep.directory))
    before = records.read_job(sweep.directory, job.folder)
    title, words = f"job {job.number}", _words(job, sweep.keys)
    try:
        if before is not None and _is_done(before, job, run_dir):
            terminal.say(f"{title} has already finished: {words}")
            return before.result
        # Before the record of a job that runs in another process is replaced.
        refuse_in_use(run_dir)
        _refuse_to_mix(before, job, run_dir, _of_hydra(chosen), words)
        resumes = _can_resume(before, job, run_dir)
        terminal.say(f"{title}{' resumes' if resumes else ''}: {words}")
        if resumes:
            config = _resuming(config, run_dir)
        if not in_worker:
            _keep_in_view(job, sweep, terminal)
        ended = _executed(job, lambda: run(config), sweep)
    except Exception as error:
        # The sweep continues with its other jobs; at its end Hydra raises the first failure again.
        complaint = f"{COMPLAINT}{title} failed: {explain(error)}"
        if in_worker:
            terminal.say(complaint)
        else:
            print(complaint, file=sys.stderr)
        raise
    _report_end(ended, run_dir, sweep.directory, terminal)
    return ended.result


def _report_end(job: Job, run_dir: Path, sweep_dir: Path, terminal: Terminal) -> None:
    accuracies = dict(zip(("clean", "worst case"), records.quoted(sweep_dir, job), strict=False))
    terminal.figures(f"job {job.number} finished", **accuracies, seconds=job.seconds)
    terminal.say(str(run_dir))


def finish(run_dir: Path, result: float | None, seconds: float) -> None:
    """Update the sweep's records after one of its jobs was resumed on its own."""
    found = records.record_of(run_dir)
    if found is None:
        return
    sweep_dir, job = found
    ended = replace(job, status=FINISHED, result=result, error="", seconds=seconds)
    ended.save(sweep_dir)
    records.write_table(sweep_dir)
    page = Page.html if (sweep_dir / SWEEP_PAGE).is_file() else Page.none
    write_summary(sweep_dir, records.read_jobs(sweep_dir), Comparison.saved(sweep_dir), page)


def conclude(sweep: SweepState, typed: Sequence[str]) -> ExitCode:
    """Write and print the summary of a sweep, or remove its directory if no job has left one.

    `typed` are the words of its command. Returns the exit code of jobs that have finished.
    """
    terminal = Terminal(verbosity=sweep.verbosity)
    code = _summarised(sweep, terminal)
    if signals.received():
        terminal.say_always(_advice(sweep, typed))
    return code


def _advice(sweep: SweepState, typed: Sequence[str]) -> str:
    """How to resume a sweep that was stopped."""
    chosen = any(word.startswith(PLACE) for word in typed)
    words = typed if chosen else [*typed, f"{PLACE}{sweep.directory}"]
    return f"resume the sweep with: {distributed.command()} {shlex.join(words)}"


def _summarised(sweep: SweepState, terminal: Terminal) -> ExitCode:
    folder = sweep.directory
    ended = records.read_jobs(folder)
    if not any((folder / job.folder).exists() for job in ended):
        # All were refused before any work.
        with suppress(OSError):
            remove_if_untouched(folder, OF_SWEEP)
        return ExitCode.success
    records.write_table(folder)
    overview = write_summary(
        folder, ended, sweep.comparison or Comparison(), sweep.page, len(sweep.planned)
    )
    if not overview.empty:
        shown = overview[[name for name in overview.columns if ", over " not in name]]
        terminal.table(shown, "means over seeds, in percent", {"seeds", "clean", "worst case"})
    if sweep.maximises:
        _report_best(ended, sweep.keys, terminal)
    code = _report_unmet(ended, sweep, terminal)
    terminal.say(records.counted(ended, len(sweep.planned)))
    for name in (SWEEP_TABLE, PAIRS, *([SWEEP_PAGE] if sweep.page == Page.html else [])):
        terminal.say(str(folder / name))
    terminal.say_always(str(folder / SUMMARY))
    return code


def _report_unmet(ended: Sequence[Job], sweep: SweepState, terminal: Terminal) -> ExitCode:
    """Print which requirements finished jobs do not meet; returns the exit code of the sweep."""
    code = ExitCode.success
    for job in ended:
        run_dir = sweep.directory / job.folder
        if job.status == FINISHED:
            code = max(code, outcome.exit_code(run_dir))
            for line in outcome.unmet(run_dir):
                terminal.say_always(f"job {job.number}: {line}")
    return code


def _report_best(ended: Sequence[Job], keys: Sequence[str], terminal: Terminal) -> None:
    found = [(job.result, job) for job in ended if job.result is not None]
    if found:
        result, job = max(found, key=lambda pair: pair[0])
        where = f"job {job.number}, {_words(job, keys)}"
        terminal.figures(f"best on the validation split: {where}", robust=result)


@contextmanager
def _in_worker(chosen: HydraConf, sweep_dir: Path) -> Iterator[Terminal]:
    """The terminal of a job that runs in a worker process of the launcher.

    Its output goes to a file that the user's process relays. A failure is reduced to its message,
    since not every exception can be pickled.
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
                # Other jobs may still run; joblib would kill them if this process exited.
                raise JobError(f"stopped by {interrupted}") from interrupted
            sys.exit(of_signal(interrupted.signum))
        except EXPECTED_ERRORS as error:
            raise JobError(explain(error)) from error
        except Exception as error:
            log.exception("unexpected error")
            where = run_dir / LOG
            raise JobError(f"{_line(error)} ({where} has the traceback)") from error


def _words(job: Job, keys: Sequence[str]) -> str:
    """What distinguishes a job: its values of the `keys` that vary, or all of its overrides."""
    varying = [f"{key}={job.settings.get(key, '')}" for key in keys]
    return " ".join(varying or job.overrides)


def _keep_in_view(job: Job, sweep: SweepState, terminal: Terminal) -> None:
    """Show a table of all jobs, with those to come, above the progress bars of this one."""
    known = {one.number: one for one in [*sweep.planned, *records.read_jobs(sweep.directory)]}
    known[job.number] = replace(job, status=RUNNING)
    shown = [known[number] for number in sorted(known)]
    cells = records.overview(sweep.directory, shown)
    focus = shown.index(known[job.number])
    terminal.keep_in_view(cells, FIGURES, focus, records.time_left(shown))


def _job(chosen: HydraConf, config: DictConfig, folder: Path) -> Job:
    written = {path.name: path.read_text() for path in _of_hydra(chosen).glob("*.yaml")}
    return Job(
        int(chosen.job.num), str(folder), tuple(as_given(chosen.overrides.task)),
        config=OmegaConf.to_yaml(without_output(config)), hydra=written,
    )  # fmt: skip


def _is_done(before: Job, job: Job, run_dir: Path) -> bool:
    same = before.config == job.config
    return before.status == FINISHED and same and (run_dir / MANIFEST).is_file()


def _can_resume(before: Job | None, job: Job, run_dir: Path) -> bool:
    """Whether the job was interrupted and can be resumed."""
    same = before is not None and before.config == job.config and before.status == UNFINISHED
    return same and (run_dir / COMMAND).is_file()


def _resuming(config: DictConfig, run_dir: Path) -> DictConfig:
    """The configuration of a job that resumes in its directory."""
    resuming = copy.deepcopy(config)
    resuming.resume = str(run_dir)
    return resuming


def _of_hydra(chosen: HydraConf) -> Path:
    """Where Hydra has written its files for a job."""
    return Path(chosen.runtime.output_dir) / str(chosen.output_subdir)


def _refuse_to_mix(before: Job | None, job: Job, run_dir: Path, of_hydra: Path, words: str) -> None:
    """Refuse to write into a directory with results of another configuration.

    Hydra has already replaced its own files `of_hydra`; they are restored.
    """
    if not {path.name for path in run_dir.iterdir()} - PREAMBLE:
        return
    owner = "an unknown job"
    if before is not None:
        if before.config == job.config:
            return
        owner = f"another job ({' '.join(before.overrides)})"
        # Earlier versions recorded whole paths, and records may come from anybody.
        contents = {Path(path).name: content for path, content in before.hydra.items()}
        for name in job.hydra:
            if name in contents:
                (of_hydra / name).write_text(contents[name])
    problem = f"holds results of {owner}, and not of {words}"
    allowed = "choose another hydra.sweep.dir, or remove that directory"
    raise InputError(str(run_dir), allowed=allowed, problem=problem)


def _executed(job: Job, run: Callable[[], float | None], sweep: SweepState) -> Job:
    """Run the job and record its outcome; a failure is recorded and raised again."""
    job.save(sweep.directory)
    started = time.perf_counter()
    try:
        ended = replace(job, status=FINISHED, result=run())
    except Exception as error:
        _keep(replace(job, status=FAILED, error=_line(error)), started, sweep)
        raise
    return _keep(ended, started, sweep)


def _keep(job: Job, started: float, sweep: SweepState) -> Job:
    timed = replace(job, seconds=time.perf_counter() - started)
    timed.save(sweep.directory)
    records.write_table(sweep.directory)
    if sweep.page == Page.html:
        # Imported here, since a page needs matplotlib, which takes long.
        from robusttrain.sweeps.sweep_page import grow

        grow(sweep.directory, sweep.comparison or Comparison(), len(sweep.planned))
    return timed


def _line(error: Exception) -> str:
    message = " ".join(explain(error).split())
    return message if isinstance(error, EXPECTED_ERRORS) else f"{type(error).__name__}: {message}"
