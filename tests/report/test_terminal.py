"""What stays in view while something runs."""

from io import StringIO

import pandas as pd
import pytest
from rich.console import Console

from robusttrain.report.terminal import Terminal

JOBS = pd.DataFrame({"job": [f"{n}" for n in range(100)], "status": [f"s{n}." for n in range(100)]})


def shown(*, terminal: bool, focus: int = 0, height: int = 30) -> str:
    file = StringIO()
    console = Console(
        file=file, force_terminal=terminal, width=80, height=height, color_system=None
    )
    speaker = Terminal(console)
    speaker.keep_in_view(JOBS, {"job"}, focus)
    with speaker.progress("training", 10) as bar:
        bar.advance(10)
    return file.getvalue()


@pytest.mark.parametrize(("focus", "first"), [(0, 0), (50, 41), (99, 82)])
def test_of_a_long_table_the_rows_around_the_focus_are_shown(focus: int, first: int) -> None:
    """18 rows, where 30 lines are there."""
    text = shown(terminal=True, focus=focus)
    assert [n for n in range(100) if f"s{n}." in text] == list(range(first, first + 18))
    assert f"s{focus}." in text
    assert "training" in text


def test_nothing_is_shown_where_there_is_no_terminal() -> None:
    assert shown(terminal=False).strip() == ""


def test_control_characters_are_shown_as_text() -> None:
    console = Console(file=StringIO(), width=80)
    terminal = Terminal(console)
    terminal.say("class \x1b[2Jcat [red]")
    terminal.table(pd.DataFrame({"job": ["\x1b[31mx"]}), "", ())
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in said
    assert r"class \x1b[2Jcat [red]" in said
    assert r"\x1b[31mx" in said


# Not a tag that is open, so as markup it would be an error.
NAMED = "[/bold]x"


def test_names_are_no_markup() -> None:
    """An attack has any name in an experiment file, and tables come after all of the work."""
    file = StringIO()
    terminal = Terminal(Console(file=file, force_terminal=True, width=120, color_system=None))
    row = {"attack": NAMED, "norm": "linf", "eps": 0.1, "n": 5, "accuracy": 0.5, "ci_low": 0.1}
    row |= {"ci_high": 0.9, "forward": 1.0, "backward": 1.0, "seconds": 1.0, "audit": "pass"}
    with terminal.progress(f"1 {NAMED}", 1):
        terminal.say(f"2 {NAMED}")
        terminal.report(pd.DataFrame([row | {"attack": f"3 {NAMED}"}]), f"4 {NAMED}")
        check = {"check": f"5 {NAMED}", "figure": 1.0, "threshold": "1 / 2", "verdict": "pass"}
        terminal.audit([check])
        terminal.table(pd.DataFrame({f"6 {NAMED}": [f"7 {NAMED}, a long cell"]}), f"8 {NAMED}", ())
    found = [number for number in range(1, 9) if f"{number} {NAMED}" in file.getvalue()]
    assert found == list(range(1, 9))
