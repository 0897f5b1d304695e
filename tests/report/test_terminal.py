"""What stays in view while something runs."""

import re
import subprocess
import sys
from collections.abc import Sequence
from io import StringIO
from typing import Any

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
    speaker.keep_in_view(JOBS, {"job"}, focus, "about 4 min left")
    with speaker.progress("training", 10) as bar:
        bar.advance(10)
    return file.getvalue()


@pytest.mark.parametrize(("focus", "first"), [(0, 0), (50, 41), (99, 82)])
def test_of_a_long_table_the_rows_around_the_focus_are_shown(focus: int, first: int) -> None:
    """18 rows, where 30 lines are there."""
    text = shown(terminal=True, focus=focus)
    assert [n for n in range(100) if f"s{n}." in text] == list(range(first, first + 18))
    assert f"s{focus}." in text
    assert "82 of 100 jobs are not shown, about 4 min left" in text
    assert "training" in text


def test_of_a_short_table_nothing_is_missing() -> None:
    text = shown(terminal=True, height=112)
    assert "s0." in text
    assert "s99." in text
    assert "not shown" not in text
    assert "about 4 min left" in text


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


def checked(name: str, verdict: str) -> dict[str, Any]:
    """A row of `audit.csv`."""
    return {"check": name, "figure": 1.0, "threshold": "1 / 2", "verdict": verdict}


def audited(verdicts: Sequence[str]) -> str:
    file = StringIO()
    checks = [
        checked(f"check {number} of this", verdict) for number, verdict in enumerate(verdicts)
    ]
    Terminal(Console(file=file, width=80, color_system=None)).audit(checks, "audit.csv")
    return file.getvalue()


def test_an_audit_that_passes_is_one_line() -> None:
    assert audited(["pass"] * 20) == "audit: pass, 20 checks\n"


def test_of_an_audit_with_doubts_these_are_shown_and_the_others_counted() -> None:
    said = audited(["pass", "warn", *["pass"] * 17, "fail"])
    assert "audit: fail" in said.splitlines()[0]
    assert re.findall(r"(\w+ \d+) of this", said) == ["check 1", "check 19"]
    assert re.findall(r" (warn|fail) +│$", said, re.M) == ["warn", "fail"]
    assert "18 of 20 checks pass (audit.csv)" in said.splitlines()[-1]


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
        terminal.audit([checked(f"5 {NAMED}", "warn")], "audit.csv")
        terminal.table(pd.DataFrame({f"6 {NAMED}": [f"7 {NAMED}, a long cell"]}), f"8 {NAMED}", ())
    found = [number for number in range(1, 9) if f"{number} {NAMED}" in file.getvalue()]
    assert found == list(range(1, 9))


def test_a_warning_is_printed_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Also where there is no log, as in `robusttrain compare`."""
    code = "from robusttrain.report.terminal import Terminal; Terminal().warn('this')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert capfd.readouterr() == ("warning: this\n", "")
