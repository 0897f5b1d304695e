"""Tables for papers: their numbers, what is bold, and text that LaTeX and Markdown would obey."""

import re
import shutil
import subprocess
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robusttrain.report.ledger import wilson
from robusttrain.sweeps import tables
from robusttrain.sweeps.tables import table_of
from toys.command_line import PATIENCE
from toys.pages import ESCAPE
from toys.sweeps import N, Sweep, flags

NASTY = r"a_b&c%d$e#f{g}~h^i\j<k>|l"


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """Three defenses of three seeds; the first is significantly better under attack."""
    sweep = Sweep(tmp_path)
    for defense, wrong in (("good", 20), (NASTY, 90), (ESCAPE, 92)):
        for seed in range(3):
            sweep.add(
                f"defense={defense}", f"seed={seed}", clean=flags(5), worst=flags(wrong + 2 * seed)
            )
    return sweep


def parsed(latex: str) -> tuple[str, list[list[str]]]:
    """The caption and the cells of a table; fails where its structure is not that of LaTeX."""
    escaped = re.sub(r"\\[&%$#_{}]", "", latex)
    depth = 0
    for character in escaped:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    assert not re.search(r"[#^~]", escaped)
    for name in ("table", "tabular"):
        assert latex.count(rf"\begin{{{name}}}") == latex.count(rf"\end{{{name}}}") == 1
    (caption,) = re.findall(r"\\caption\{(.*)\}", latex)
    (columns, body) = re.findall(
        r"\\begin\{tabular\}\{([lr]+)\}\n(.*)\n *\\end\{tabular\}", latex, re.DOTALL
    )[0]
    lines = [line.strip() for line in body.splitlines()]
    assert (lines.pop(0), lines.pop(1), lines.pop()) == (r"\toprule", r"\midrule", r"\bottomrule")
    assert all(line.endswith(r"\\") for line in lines)
    cells = [re.split(r"(?<!\\)&", line.removesuffix(r"\\")) for line in lines]
    assert {len(row) for row in cells} == {len(columns)}
    return caption, [[cell.strip() for cell in row] for row in cells]


def test_latex_has_the_means_and_deviations_and_what_they_are_of(sweep: Sweep) -> None:
    caption, (head, best, *others) = parsed(table_of(sweep.folder, "latex"))
    assert head == ["defense", "seeds", "clean", "worst case"]
    # 20, 22 and 24 errors of 200: 89 % on average, and a deviation of 1.
    assert best == ["good", "3", r"97.50 $\pm$ 0.00", r"\textbf{89.00} $\pm$ 1.00"]
    assert [row[3] for row in others] == [r"54.00 $\pm$ 1.00", r"53.00 $\pm$ 1.00"]
    for words in (
        r"in \% on 200 test images of digits", "over seeds 0, 1, 2", "linf at eps 0.1",
        "attacks pgd", "McNemar", r"Holm's correction for 3 tests, by worst case",
    ):  # fmt: skip
        assert words in caption


def test_nothing_is_bold_without_significance(sweep: Sweep) -> None:
    """The second setting differs from the third in two images."""
    for job in range(3):
        shutil.rmtree(sweep.folder / str(job))
        (sweep.folder / ".jobs" / f"{job}.json").unlink()
    assert "textbf" not in table_of(sweep.folder, "latex").replace("textbackslash", "")
    assert "**" not in table_of(sweep.folder, "markdown")


def test_names_are_text_in_latex_and_in_markdown(sweep: Sweep) -> None:
    for form in ("latex", "markdown", "csv"):
        assert "\x1b" not in table_of(sweep.folder, form)
    _, cells = parsed(table_of(sweep.folder, "latex"))
    shown = cells[2][0]
    for command, character in {
        r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^",
        r"\textless{}": "<", r"\textgreater{}": ">", r"\textbar{}": "|",
    }.items():  # fmt: skip
        shown = shown.replace(command, character)
    assert re.sub(r"\\([&%$#_{}])", r"\1", shown) == NASTY
    lines = table_of(sweep.folder, "markdown").splitlines()
    (line,) = (line for line in lines if line.startswith(r"| a\_b"))
    cells_of_line = re.split(r"(?<!\\)\|", line)
    assert len(cells_of_line) == 6
    assert re.sub(r"\\(.)", r"\1", cells_of_line[1].strip()) == NASTY


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
def test_any_text_keeps_its_braces_and_ends_no_cell(text: str) -> None:
    latex = tables._latex(text)
    bare = re.sub(r"\\[&%$#_{}]", "", latex)
    assert bare.count("{") == bare.count("}")
    assert not re.search(r"[&%#_~^\n\x1b]", bare)
    assert not re.search(r"(?<!\\)(\\\\)*[|<\n]", tables._markdown(text))


def test_csv_has_every_accuracy_with_its_intervals(sweep: Sweep) -> None:
    table = pd.read_csv(StringIO(table_of(sweep.folder, "csv")))
    assert list(table) == ["defense", *tables.OWN]
    assert table["measure"].tolist() == ["clean", "worst_case"] * 3
    row = table.iloc[1]
    assert (row["mean"], row["deviation"], row["n"], row["seeds"]) == (0.89, 0.01, N, 3)
    assert (row["images_low"], row["images_high"]) == pytest.approx(wilson(178, N), abs=1e-6)
    # t with two degrees of freedom, from a printed table: 4.303.
    assert row["seeds_high"] == pytest.approx(0.89 + 4.303 * 0.01 / 3**0.5, abs=1e-5)
    assert table["letters"].tolist()[1::2] == ["a", "b", "b"]


def test_a_key_named_like_a_column_gets_another_name(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    for value in "12":
        sweep.add(f"n={value}", clean=flags(int(value)))
    assert "config.n" in pd.read_csv(StringIO(table_of(sweep.folder, "csv")))


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex is installed")
def test_latex_is_typeset(sweep: Sweep, tmp_path: Path) -> None:
    document = rf"""\documentclass{{article}}\usepackage[T1]{{fontenc}}\usepackage{{booktabs}}
\begin{{document}}{table_of(sweep.folder, "latex")}\end{{document}}"""
    (tmp_path / "table.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "table.tex"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout
