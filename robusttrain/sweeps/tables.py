"""Tables for papers: the settings of a sweep in LaTeX, in Markdown and as CSV."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from robusttrain.errors import InputError, printable
from robusttrain.report.compare import Measure, Run, titles
from robusttrain.report.files import csv_text
from robusttrain.sweeps import records
from robusttrain.sweeps.accuracies import intervals
from robusttrain.sweeps.pairs import Comparison
from robusttrain.sweeps.ranking import (
    MOST_RANKED,
    Ranking,
    all_pairs,
    clear_winner,
    lettered,
    rankings,
)
from robusttrain.sweeps.settings import Figure, Setting
from robusttrain.sweeps.settings import settings as settings_of

# What LaTeX would read as a command.
LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}  # fmt: skip

# Columns of the long form.
OWN = (
    "measure", "attack_norm", "attack_eps", "n", "seeds", "mean", "deviation", "seeds_low",
    "seeds_high", "images_low", "images_high", "rank", "letters",
)  # fmt: skip

# What Markdown would read as the end of a cell, or as markup.
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~$])")


class Cell(NamedTuple):
    """An accuracy of a setting, and whether it is significantly better than all others."""

    figure: Figure
    is_best: bool


class Table(NamedTuple):
    """A line for each setting: its keys, its seeds, and its accuracies by their titles."""

    keys: tuple[str, ...]
    titles: tuple[str, ...]
    lines: Sequence[tuple[Setting, Mapping[str, Cell]]]
    caption: str


def paper_table(settings: Sequence[Setting], comparison: Comparison) -> Table:
    """The table of some settings, the best of each ranking first."""
    ranked = rankings(settings)
    tested = all_pairs(ranked, comparison.accuracies)
    lines = [
        (setting, _cells(ranking, setting, tested))
        for ranking in ranked
        for setting in ranking.settings
    ]
    keys = dict.fromkeys(key for setting in settings for key in setting.keys)
    names = dict.fromkeys(title for _, cells in lines for title in cells)
    return Table(tuple(keys), tuple(names), lines, _caption(settings, tested))


def table_of(sweep_dir: Path, form: str) -> str:
    """The table of the settings of a sweep, in the form `latex`, `markdown` or `csv`.

    Raises
    ------
    InputError
        If no job has finished an evaluation.
    """
    found = settings_of(sweep_dir, records.read_jobs(sweep_dir))
    if not found:
        raise InputError(str(sweep_dir), problem="has no job that has finished an evaluation")
    comparison = Comparison.saved(sweep_dir)
    if form == "csv":
        return csv(found, comparison)
    made = paper_table(found, comparison)
    return latex(made) if form == "latex" else markdown(made)


def latex(table: Table) -> str:
    """A table with booktabs, with its caption and its label."""
    columns = "l" * len(table.keys) + "r" * (1 + len(table.titles))
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{_latex(table.caption)}}}",
            r"  \label{tab:sweep}",
            rf"  \begin{{tabular}}{{{columns}}}",
            r"    \toprule",
            *_aligned(table, _latex, r"\textbf{{{}}}", ("    ", " & ", r" \\"), r"    \midrule"),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
        ]
    )


def markdown(table: Table) -> str:
    """A table with its caption below."""
    kinds = ["---"] * len(table.keys) + ["---:"] * (1 + len(table.titles))
    rule = f"| {' | '.join(kinds)} |"
    lines = _aligned(table, _markdown, "**{}**", ("| ", " | ", " |"), rule)
    return "\n".join([*lines, "", _markdown(table.caption)])


def csv(settings: Sequence[Setting], comparison: Comparison) -> str:
    """All accuracies in long form: a row for each setting and accuracy, shares from 0 to 1.

    A key with the name of another column is called `config.<key>`, as in `sweep.csv`.
    """
    ranked = rankings(settings)
    tested = all_pairs(ranked, comparison.accuracies)
    # Settings may lack keys of others; all keys come before the figures.
    names = dict.fromkeys(_column(key) for setting in settings for key in setting.keys)
    rows: list[dict[str, object]] = []
    for ranking in ranked:
        letters = lettered(ranking, tested)
        for rank, (setting, letter) in enumerate(zip(ranking.settings, letters, strict=True), 1):
            for measure in setting.measures:
                own = _numbers(setting, measure, rank, letter if measure == ranking.measure else "")
                keys = {_column(key): value for key, value in setting.keys.items()}
                rows.append(dict.fromkeys(names, "") | keys | own)
    return csv_text(rows).rstrip("\n")


def _column(key: str) -> str:
    return f"config.{key}" if key in OWN else key


def _numbers(setting: Setting, measure: Measure, rank: int, letters: str) -> dict[str, object]:
    figure, threat = setting.figure(measure), measure.threat
    (row, *_) = (run.rows[measure] for run in setting.runs.values())
    return {
        "measure": measure.attack,
        "attack_norm": threat.norm if threat else "",
        "attack_eps": threat.eps if threat else math.nan,
        "n": int(row["n"]),
        "seeds": len(setting.runs),
        "mean": figure.mean,
        "deviation": math.nan if figure.deviation is None else figure.deviation,
        **intervals(figure),
        "rank": rank,
        "letters": letters,
    }


def _cells(ranking: Ranking, setting: Setting, tested: pd.DataFrame) -> dict[str, Cell]:
    return {
        title: Cell(setting.figure(measure), clear_winner(ranking, measure, tested) is setting)
        for measure, title in titles(setting.measures).items()
    }


def _caption(settings: Sequence[Setting], tested: pd.DataFrame) -> str:
    runs = [run for setting in settings for run in setting.runs.values()]
    data = _listed(f"{len(run.label)} test images of {run.clean['dataset']}" for run in runs)
    seeds = _listed(", ".join(setting.runs) for setting in settings)
    over = "mean ± sample standard deviation over seeds" if _repeated(settings) else "of seed"
    return " ".join(
        [
            f"Accuracy in % on {data}, {over} {seeds}.",
            f"Worst case in {threat_words(runs)}, over the attacks {attack_words(runs)}.",
            _significance(settings, tested),
        ]
    )


def _significance(settings: Sequence[Setting], tested: pd.DataFrame) -> str:
    if len(settings) > MOST_RANKED:
        return f"No line is bold: of more than {MOST_RANKED} settings, not all pairs are tested."
    if tested.empty:
        return "No line is bold: no two settings could be tested."
    accuracies = " and ".join(dict.fromkeys(tested["measure"].str.replace("_", " ")))
    for_each = " for each seed, of which the largest p counts" if _repeated(settings) else ""
    return (
        "Bold: significantly better than every other setting under the same threat model "
        f"(McNemar's exact test{for_each}; p < 0.05 after Holm's correction for "
        f"{len(tested)} tests, by {accuracies})."
    )


def threat_words(runs: Iterable[Run]) -> str:
    """The threat models of some runs: `linf at eps 0.05, 0.1`."""
    radii: dict[str, dict[str, None]] = {}
    for threat in (threat for run in runs for threat in run.threats):
        radii.setdefault(threat.norm, {})[f"{threat.eps:g}"] = None
    return " and ".join(f"{norm} at eps {', '.join(found)}" for norm, found in radii.items())


def attack_words(runs: Iterable[Run]) -> str:
    """The attacks of some runs."""
    return _listed(", ".join(run.attacks) for run in runs)


def _repeated(settings: Sequence[Setting]) -> bool:
    return any(len(setting.runs) > 1 for setting in settings)


def _listed(texts: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(texts))


def _aligned(
    table: Table, escape: Callable[[str], str], bold: str, ends: tuple[str, str, str], rule: str
) -> list[str]:
    """The lines of a table, its columns below each other, with a rule below the first line."""
    rows = [[escape(name) for name in (*table.keys, "seeds", *table.titles)]]
    for setting, cells in table.lines:
        keys = [escape(setting.keys.get(key, "")) for key in table.keys]
        accuracies = [
            _spread(cells[title], escape, bold) if title in cells else "" for title in table.titles
        ]
        rows.append([*keys, str(len(setting.runs)), *accuracies])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    start, between, end = ends
    lines = [start + between.join(map(str.ljust, row, widths)) + end for row in rows]
    return [lines[0], rule, *lines[1:]]


def _spread(cell: Cell, escape: Callable[[str], str], bold: str) -> str:
    """The mean ± the standard deviation, in percent."""
    mean, deviation = f"{100 * cell.figure.mean:.2f}", cell.figure.deviation
    spread = [] if deviation is None else [escape(f"± {100 * deviation:.2f}")]
    return " ".join([bold.format(mean) if cell.is_best else mean, *spread])


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in _line(text))


def _markdown(text: str) -> str:
    return MARKDOWN.sub(r"\\\1", _line(text))


def _line(text: str) -> str:
    """Text in one line, without control characters."""
    return printable(" ".join(text.split()))
