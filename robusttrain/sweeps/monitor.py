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

POLL_SECONDS = 0.5

# The beginning of a failure in the output of a job; such lines go to the standard error.
COMPLAINT = "robusttrain: "

# Columns of numbers, which are aligned on the right.
FIGURES = {"job", "clean", "worst case", "seconds"}


@contextmanager
def monitored(sweep_dir: Path, planned: Sequence[Job], terminal: Terminal) -> Iterator[None]:
    """Relay the output of the jobs of a sweep while the block runs.

    In a terminal, a table of all jobs stays in view. When a deferred signal is pending, the child
    processes are terminated.

    Parameters
    ----------
    sweep_dir
        The directory of the sweep.
    planned
        Its jobs, as far as they are known.
    terminal
        The terminal of the user.
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
    """Polls the output of jobs, and remembers what it has relayed."""

    def __init__(self, sweep_dir: Path, planned: Sequence[Job], terminal: Terminal) -> None:
        self.sweep_dir, self.planned, self.terminal = sweep_dir, planned, terminal
        self.relayed = {path: path.stat().st_size for path in records.job_outputs(sweep_dir)}
        self.active: set[Path] = set()
        self.ended = 0
        self.stopping = False

    def until(self, ended: Event) -> None:
        """Poll until `ended` is set."""
        with self.terminal.progress("jobs", len(self.planned) or None) as bar:
            self._show(bar)
            while not ended.wait(POLL_SECONDS):
                self._poll(bar)
                if signals.pending() and not self.stopping:
                    self._stop()
            self._poll(bar)

    def _poll(self, bar: Bar) -> None:
        lines = [line for path in records.job_outputs(self.sweep_dir) for line in self._new(path)]
        for line in lines:
            if line.startswith(COMPLAINT):
                print(line, file=sys.stderr)
            else:
                self.terminal.say(line)
        if lines:
            self._show(bar)

    def _new(self, path: Path) -> list[str]:
        """The complete lines that were not relayed yet."""
        start = self.relayed.get(path, 0)
        if path.stat().st_size <= start:
            return []
        with path.open("rb") as file:
            file.seek(start)
            text, newline, _ = file.read().rpartition(b"\n")
        self.relayed[path] = start + len(text) + len(newline)
        self.active.add(path)
        return text.decode().splitlines()

    def _show(self, bar: Bar) -> None:
        if not self.terminal.console.is_terminal:
            return
        known = {job.number: job for job in self.planned}
        known |= {job.number: self._current(job) for job in records.read_jobs(self.sweep_dir)}
        shown = [known[number] for number in sorted(known)]
        if shown:
            running = [i for i, job in enumerate(shown) if job.status == RUNNING]
            self.terminal.keep_in_view(
                records.overview(self.sweep_dir, shown), FIGURES, running[0] if running else 0,
                records.time_left(shown),
            )  # fmt: skip
        ended = sum(job.status in (FINISHED, FAILED) for job in shown)
        bar.advance(ended - self.ended)
        self.ended = ended

    def _current(self, job: Job) -> Job:
        """The job with its current status: its record may be of an earlier start of the sweep."""
        active = records.job_output(self.sweep_dir, job.folder) in self.active
        if job.status == UNFINISHED:
            return replace(job, status=RUNNING if active else WAITING)
        return job if active or job.status == FINISHED else replace(job, status=WAITING)

    def _stop(self) -> None:
        self.stopping = True
        self.terminal.say_always("stopping: saving checkpoints; press Ctrl+C again to quit now")
        for child in active_children():
            if child.pid is not None:
                os.kill(child.pid, signal.SIGTERM)
