"""Relay the output and status of jobs that run in other processes."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from threading import Event, Thread

from robusttrain.report.terminal import Bar, Terminal
from robusttrain.runtime import signals
from robusttrain.sweeps import records
from robusttrain.sweeps.records import FAILED, FINISHED, RUNNING, UNFINISHED, WAITING, Job

SECONDS_BETWEEN_LOOKS = 0.5

# What jobs say before a failure; such lines go to the standard error.
COMPLAINT = "robusttrain: "

# Figures stand on the right.
FIGURES = {"job", "clean", "worst case", "seconds"}


@contextmanager
def monitored(sweep_dir: Path, planned: Sequence[Job], terminal: Terminal) -> Iterator[None]:
    """Pass on what the jobs of a sweep say in their files, for the length of the block.

    In a terminal, a table of all jobs stays in view. Where a signal has come that somebody put off,
    the child processes are told to stop.

    Parameters
    ----------
    sweep_dir
        The directory of the sweep.
    planned
        Its jobs, as far as they are known.
    terminal
        Where it is passed on to.
    """
    watch = _Watch(sweep_dir, planned, terminal)
    ended = Event()
    thread = Thread(target=watch.until, args=(ended,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Watch:
    """The state of what was passed on already."""

    def __init__(self, sweep_dir: Path, planned: Sequence[Job], terminal: Terminal) -> None:
        self.sweep_dir, self.planned, self.terminal = sweep_dir, planned, terminal
        self.passed_on = {path: path.stat().st_size for path in records.job_outputs(sweep_dir)}
        self.heard: set[Path] = set()
        self.ended = 0
        self.stopping = False

    def until(self, ended: Event) -> None:
        """Look again and again."""
        with self.terminal.progress("jobs", len(self.planned) or None) as bar:
            self._show(bar)
            while not ended.wait(SECONDS_BETWEEN_LOOKS):
                self._look(bar)
                if signals.pending() and not self.stopping:
                    self._stop()
            self._look(bar)

    def _look(self, bar: Bar) -> None:
        lines = [line for path in records.job_outputs(self.sweep_dir) for line in self._new(path)]
        for line in lines:
            if line.startswith(COMPLAINT):
                print(line, file=sys.stderr)
            else:
                self.terminal.say(line)
        if lines:
            self._show(bar)

    def _new(self, path: Path) -> list[str]:
        """The whole lines that were not passed on yet."""
        start = self.passed_on.get(path, 0)
        if path.stat().st_size <= start:
            return []
        with path.open("rb") as file:
            file.seek(start)
            said, newline, _ = file.read().rpartition(b"\n")
        self.passed_on[path] = start + len(said) + len(newline)
        self.heard.add(path)
        return said.decode().splitlines()

    def _show(self, bar: Bar) -> None:
        if not self.terminal.console.is_terminal:
            return
        known = {job.number: job for job in self.planned}
        known |= {job.number: self._standing(job) for job in records.read_jobs(self.sweep_dir)}
        shown = [known[number] for number in sorted(known)]
        if shown:
            running = [i for i, job in enumerate(shown) if job.status == RUNNING]
            self.terminal.keep_in_view(
                records.overview(self.sweep_dir, shown), FIGURES, running[0] if running else 0
            )
        ended = sum(job.status in (FINISHED, FAILED) for job in shown)
        bar.advance(ended - self.ended)
        self.ended = ended

    def _standing(self, job: Job) -> Job:
        """A job with the status that it has now: its record may be of an earlier sweep."""
        heard = records.job_output(self.sweep_dir, job.folder) in self.heard
        if job.status == UNFINISHED:
            return replace(job, status=RUNNING if heard else WAITING)
        return job if heard or job.status == FINISHED else replace(job, status=WAITING)

    def _stop(self) -> None:
        self.stopping = True
        self.terminal.say("stopping: saving checkpoints; press Ctrl+C again to quit now")
        for child in active_children():
            if child.pid is not None:
                os.kill(child.pid, signal.SIGTERM)
