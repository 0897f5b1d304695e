"""The terminal: progress, messages and tables; plain lines where the output is a file or a pipe."""

import logging
import math
import os
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from robusttrain.errors import printable
from robusttrain.report.verbosity import Verbosity

log = logging.getLogger("robusttrain")
# Without a handler, Python would print warnings a second time, to the standard error.
log.addHandler(logging.NullHandler())

# Often enough to look alive, seldom enough to cost nothing.
SECONDS_BETWEEN_UPDATES = 0.2
# What a table that stays in view leaves of the terminal: for its head, two bars and some lines.
ROWS_BELOW = 12

# How wide tables are in the log.
LOG_WIDTH = 120

# Figures that are shown in percent.
SHARES = ("clean", "robust", "worst case")

# Verdicts of an audit, from good to bad, and how they look.
STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}


class Bar:
    """Progress of one piece of work, shown at most a few times a second."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self._shown = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time to show figures again; computing them can cost a synchronisation."""
        return time.monotonic() - self._shown >= SECONDS_BETWEEN_UPDATES

    def advance(self, steps: int = 1) -> None:
        """`steps` more are done."""
        self._progress.advance(self._task, steps)

    def show(self, title: str, **figures: float | None) -> None:
        """Replace the title and the figures; those that are None are not known, and left out."""
        self._shown = time.monotonic()
        self._progress.update(self._task, description=title, figures=_phrase(figures))


class _Below(Progress):
    """Bars with something above them that stays in view as long as they do."""

    above: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is shown, from top to bottom."""
        if self.above is not None:
            yield self.above
        yield from super().get_renderables()


class _Output(Console):
    def on_broken_pipe(self) -> None:
        """Continue in silence: the output has lost its reader, but the files are still wanted."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())


class Terminal:
    """The output of a run for its user; all of it also goes to the run's log.

    Parameters
    ----------
    console
        Where it is printed; the standard output if not given.
    verbosity
        `quiet` prints warnings and the last line only, and `verbose` also details.
    logs
        Whether what is printed also goes to the log.
    """

    def __init__(
        self,
        console: Console | None = None,
        verbosity: Verbosity = Verbosity.normal,
        *,
        logs: bool = True,
    ) -> None:
        self.console = console or _Output(highlight=False, soft_wrap=True)
        self.verbosity, self.logs = verbosity, logs
        if verbosity is Verbosity.verbose:
            log.setLevel(logging.DEBUG)
        self._progress: _Below | None = None
        self._above: RenderableType | None = None

    def keep_in_view(
        self, cells: pd.DataFrame, figures: Collection[str], focus: int, note: str = ""
    ) -> None:
        """Show a table of jobs above every progress bar from now on, also above one that is there.

        Of a table that is too long for the terminal, the rows around `focus`. A line below counts
        the others, and ends with `note`.
        """
        room = max(3, self.console.height - ROWS_BELOW)
        first = max(0, min(focus - room // 2, len(cells) - room))
        shown = cells.iloc[first : first + room]
        hidden = f"{len(cells) - len(shown)} of {len(cells)} jobs are not shown"
        notes = [hidden] * (len(shown) < len(cells)) + [note] * bool(note)
        self._above = Group(_table(shown, "", figures), *(Text(", ".join(notes)),) * bool(notes))
        if self._progress is not None:
            self._progress.above = self._above

    @property
    def quiet(self) -> bool:
        """Whether only warnings and the last line are printed."""
        return self.verbosity is Verbosity.quiet

    def say(self, text: str) -> None:
        """Print one line, unless the terminal is quiet."""
        self._line(logging.INFO, text, shown=not self.quiet)

    def say_always(self, text: str) -> None:
        """Print one line, also if the terminal is quiet."""
        self._line(logging.INFO, text)

    def warn(self, text: str) -> None:
        """Print a warning, also if the terminal is quiet."""
        self._line(logging.WARNING, f"warning: {text}")

    def detail(self, text: str) -> None:
        """Print one line if the terminal is verbose."""
        self._line(logging.DEBUG, text, shown=self.verbosity is Verbosity.verbose)

    def _line(self, level: int, text: str, *, shown: bool = True) -> None:
        text = printable(text)
        if self.logs:
            log.log(level, "%s", text)
        if shown:
            self.console.print(text, markup=False)

    def _show(self, table: RenderableType, level: int = logging.INFO) -> None:
        """Print a table, unless the terminal is quiet, and write it to the log."""
        if self.logs:
            _log(table, level)
        if not self.quiet:
            self.console.print(table)

    def figures(self, title: str, **figures: float | None) -> None:
        """Print a line of figures."""
        self.say(f"{title}  {_phrase(figures)}")

    @contextmanager
    def progress(self, title: str, total: int | None) -> Iterator[Bar]:
        """A live bar with the time left; nothing at all where the output is not a terminal.

        Within another one it is a second line below. Without a total it only shows that work is
        being done.
        """
        with self._live() as progress:
            task = progress.add_task(title, total=total, figures="")
            yield Bar(progress, task)
            progress.remove_task(task)

    @contextmanager
    def _live(self) -> Iterator[Progress]:
        if self._progress is not None:
            yield self._progress
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
        )
        disable = self.quiet or not self.console.is_terminal
        with _Below(
            *columns, console=self.console, transient=True, expand=True, disable=disable
        ) as self._progress:
            self._progress.above = self._above
            try:
                yield self._progress
            finally:
                self._progress = None

    def report(self, report: pd.DataFrame, title: str) -> None:
        """Print the attack, eps, accuracy and interval columns of a report."""
        table = Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left", padding=0)
        cells = report_cells(report)
        for name in cells.columns:
            justify: JustifyMethod = "left" if name in ("attack", "norm", "audit") else "right"
            table.add_column(name, justify=justify, no_wrap=True)
        for *figures, verdict in cells.itertuples(index=False):
            table.add_row(*map(Text, figures), Text(verdict, STYLES.get(verdict, "")))
        self._show(table)

    def audit(self, checks: Sequence[Mapping[str, Any]], file: str) -> None:
        """Print the verdict of an audit, and those of its checks that do not pass.

        Parameters
        ----------
        checks
            The rows of `audit.csv`.
        file
            The name of the file that has all of them.
        """
        worst = max((check["verdict"] for check in checks), key=list(STYLES).index)
        doubts = [check for check in checks if check["verdict"] != "pass"]
        for check in checks:
            self.detail(f"{check['verdict']}: {check['check']} {check['figure']:.3g}")
        if not doubts:
            self.say(f"audit: {worst}, {len(checks)} checks")
            return
        table = Table(box=box.SIMPLE_HEAD, title_justify="left")
        table.add_column("check")
        for name in ("figure", "warn / fail above"):
            table.add_column(name, justify="right")
        table.add_column("")
        for check in doubts:
            verdict = Text(check["verdict"], STYLES[check["verdict"]])
            figure = f"{check['figure']:.3g}"
            table.add_row(Text(check["check"]), figure, check["threshold"], verdict)
        passed = f"{len(checks) - len(doubts)} of {len(checks)} checks pass ({file})"
        if self.quiet:
            self.warn(f"audit: {worst}, {passed}")
        panel = Panel(table, title=f"audit: {worst}", subtitle=passed, expand=False)
        self._show(panel, logging.WARNING)

    def certified(self, curve: pd.DataFrame, paper: str) -> None:
        """Print certified accuracy at each radius; `paper` has the theorem behind it, if known."""
        rows = curve.to_dict("records")
        cells = pd.DataFrame(
            {
                "radius": f"{row['eps']:g}",
                "certified accuracy": f"{row['accuracy']:.2%}",
                "95 % interval": f"{100 * row['ci_low']:.1f} to {100 * row['ci_high']:.1f}",
            }
            for row in rows
        )
        norm, n = rows[0]["norm"], rows[0]["n"]
        source = f" ({paper})" if paper else ""
        self.table(cells, f"certified in {norm} on {n} images{source}", cells.columns)

    def table(self, cells: pd.DataFrame, title: str, figures: Collection[str]) -> None:
        """Print a table of text within the width of the terminal.

        Columns in `figures` stand on the right and are kept whole; the others are broken over
        lines where there is no room.
        """
        self._show(_table(cells, title, figures))


def _table(cells: pd.DataFrame, title: str, figures: Collection[str]) -> Table:
    table = Table(
        title=Text(title) if title else None, box=box.SIMPLE_HEAD, title_justify="left",
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    for name in cells.columns:
        if name in figures:
            table.add_column(Text(name), justify="right", no_wrap=True)
        else:
            table.add_column(Text(name), overflow="fold", min_width=len(name))
    for row in cells.itertuples(index=False):
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def report_cells(report: pd.DataFrame) -> pd.DataFrame:
    """The columns of a report that people read, as text."""
    rows: list[Any] = report.to_dict("records")
    return pd.DataFrame(
        {
            "attack": row["attack"],
            "norm": row["norm"],
            "eps": _known(row["eps"], ".3g"),
            "n": str(row["n"]),
            "accuracy": _known(row["accuracy"], ".2%"),
            "95 % interval": _interval(row),
            "passes": _known(row["forward"] + row["backward"], ".0f"),
            "seconds": _known(row["seconds"], ".1f"),
            "audit": row["audit"],
        }
        for row in rows
    )


def _interval(row: Mapping[str, Any]) -> str:
    low, high = (_known(100 * row[end], ".1f") for end in ("ci_low", "ci_high"))
    return f"{low} to {high}" if low else ""


def _log(table: RenderableType, level: int) -> None:
    text = StringIO()
    Console(file=text, width=LOG_WIDTH, color_system=None).print(table)
    for line in text.getvalue().splitlines():
        if line.strip():
            log.log(level, "%s", line.rstrip())


def _known(value: float, form: str) -> str:
    """A number in a table; nothing where it is not known."""
    return "" if math.isnan(value) else format(value, form)


def _phrase(figures: Mapping[str, float | None]) -> str:
    known = ((name, value) for name, value in figures.items() if value is not None)
    return "  ".join(f"{name} {_number(name, value)}" for name, value in known)


def _number(name: str, value: float) -> str:
    if name in SHARES:
        return f"{value:.1%}"
    return f"{value:.3g}"
