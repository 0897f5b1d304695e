"""The page of a sweep, and of runs that are compared: rankings, trade-offs, curves and tests."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pandas as pd

from robusttrain.report.compare import suites
from robusttrain.report.ledger import CLEAN
from robusttrain.report.page.document import render
from robusttrain.report.page.figures import CYCLE, Picture
from robusttrain.report.radii import LEGEND as LEGEND_OF_RADII
from robusttrain.run_directory import PAGE
from robusttrain.sweeps import axes, drawing
from robusttrain.sweeps.accuracies import Accuracies, accuracies, robust
from robusttrain.sweeps.pairs import BASELINE, lines
from robusttrain.sweeps.ranking import MOST_RANKED, Ranking, lettered, rankings, standing
from robusttrain.sweeps.settings import Figure, Setting
from robusttrain.sweeps.tables import attack_words, threat_words
from robusttrain.sweeps.tradeoff import trade_off

TEMPLATE = "sweep/sweep.html"

# More figures of one kind are not read, and take long to draw.
MOST_FIGURES = 12

# The width of a bar of a ranking, in units of the drawing.
BAR = 160

# How to read the figures of each section.
TRADE_OFF = """\
Filled points are on the Pareto front: no other setting is better in one accuracy and as good in the
other. Their numbers are their ranks. Thick bars are 95 % intervals over seeds, thin bars over
images."""
CURVES = "Points are means over the seeds."
GRIDS = "Cells are means over the seeds, in percent; lighter is higher."


class Content(NamedTuple):
    """What a page is about.

    Parameters
    ----------
    title, subtitle
        The headings.
    settings
        The settings, or each run as one.
    tested
        Tests of all pairs in each ranking; see `ranking.all_pairs`.
    compared
        Tests that the user has chosen; see `pairs.pairwise`.
    baseline
        The baseline of these, as it is typed; empty if there is none.
    radii
        Radii of pairs of runs, as text; see `report.radii.in_words`. Empty if there are none.
    notes
        Tables of jobs by their headings: flagged, failed and so on.
    counts
        How the jobs have ended, in words.
    command
        The command that makes it again; empty if it is unknown.
    """

    title: str
    subtitle: str
    settings: Sequence[Setting]
    tested: pd.DataFrame
    compared: pd.DataFrame
    baseline: str
    radii: pd.DataFrame
    notes: Mapping[str, pd.DataFrame]
    counts: str
    command: str


class Section(NamedTuple):
    """Figures below a heading, with how to read them, or a line that says why there are none."""

    heading: str
    note: str
    pictures: Sequence[Picture]
    missing: str


def page(content: Content, folder: Path) -> str:
    """The HTML of a page; its links to the runs are relative to `folder`, where it will be."""
    measured = accuracies(content.settings)
    ranked = rankings(content.settings)
    boards = [_board(ranking, content, measured, folder) for ranking in ranked]
    sections = [
        Section(
            "Clean against robust accuracy",
            TRADE_OFF,
            *_trade_offs(content.settings, ranked, measured),
        ),
        Section("Accuracy over a numeric key", CURVES, *_curves(content.settings, measured)),
        Section("Accuracy over two numeric keys", GRIDS, *_grids(content.settings, measured)),
    ]
    return render(
        TEMPLATE,
        content=content,
        facts=_facts(content, ranked),
        boards=boards,
        lettered=any(row["letters"] for board in boards for row in board["rows"]),
        against_baseline=any(row["standing"] for board in boards for row in board["rows"]),
        unlettered=_unlettered(content, ranked),
        sections=sections,
        tests=_tests(content),
        legend_of_radii=LEGEND_OF_RADII,
        bar=BAR,
    )


# --- in a few lines -------------------------------------------------------------------------------


def _facts(content: Content, ranked: Sequence[Ranking]) -> list[str]:
    """What a reader should know first, in a few lines."""
    runs = [run for setting in content.settings for run in setting.runs.values()]
    if not runs:
        return [content.counts, "No job has finished an evaluation yet."]
    data = dict.fromkeys(f"{len(run.label)} test images of {run.clean['dataset']}" for run in runs)
    facts = [content.counts, f"Evaluated on {' or '.join(data)}."]
    if any(run.threats for run in runs):
        facts[-1] += f" Worst case in {threat_words(runs)}, over the attacks {attack_words(runs)}."
    facts += [_winner(ranking, content) for ranking in ranked]
    if len(suites(runs)) > 1:
        facts.append("Warning: the runs faced different attacks.")
    return [fact for fact in facts if fact]


def _winner(ranking: Ranking, content: Content) -> str:
    """The best setting of a ranking, and how many cannot be told apart from it."""
    best, *others = ranking.settings
    name = f"{drawing.as_adjective(robust(ranking.measure))} accuracy"
    under = f"Under {ranking.threat}: " if ranking.threats else ""
    accuracy = f"{name} is {spread(ranking.figure(best))} %"
    line = f"{under}the highest {accuracy}, of {best.words}."
    if not others:
        line = f"{under}the {accuracy}{best.words and f', of {best.words}'}."
    letters = lettered(ranking, content.tested)
    if others and letters[0]:
        alike = sum(bool({*letters[0]} & {*other}) for other in letters[1:])
        line += f" {_alike(alike, len(others))}"
    return line[:1].upper() + line[1:]


def _alike(count: int, others: int) -> str:
    """How many of the other settings cannot be told apart from the best one."""
    if not count:
        return "It is significantly better than all others."
    if count == others:
        return "No other can be told apart from it."
    return f"{count} of {others} others cannot be told apart from it."


def _unlettered(content: Content, ranked: Sequence[Ranking]) -> str:
    """Why there are no letters; empty if there are."""
    if len(content.settings) > MOST_RANKED:
        chosen = f"Those with {content.baseline} are the baseline." if content.baseline else ""
        return chosen or (
            f"There are more than {MOST_RANKED} settings, so that not all pairs are tested. Give "
            f"the same command again with {BASELINE}=KEY=VALUE to test each against a baseline."
        )
    if all(len(ranking.settings) == 1 for ranking in ranked):
        return "No two settings can be compared: their threat models or data differ."
    return "" if len(content.tested) else "No two settings could be tested on the same images."


def _tests(content: Content) -> dict[str, pd.DataFrame]:
    """The tests as text, by what they are for."""
    tables = {"for the letters": content.tested, "that were chosen": content.compared}
    return {
        f"{len(table)} tests {purpose}": lines(table)
        for purpose, table in tables.items()
        if len(table)
    }


# --- rankings -------------------------------------------------------------------------------------


def _board(
    ranking: Ranking, content: Content, measured: Accuracies, folder: Path
) -> dict[str, Any]:
    """A ranking as the template shows it."""
    keys = dict.fromkeys(key for setting in ranking.settings for key in setting.keys)
    names = dict.fromkeys(name for s in ranking.settings for name in measured[s.words])
    low, high = scale([ranking.figure(setting) for setting in ranking.settings])
    letters = aligned(lettered(ranking, content.tested))
    against = standing(ranking, content.compared) if content.baseline else [""] * len(letters)
    rows = [
        {
            "rank": rank,
            "keys": [setting.keys.get(key, "") for key in keys],
            "runs": [(seed, link(run.folder, folder)) for seed, run in setting.runs.items()],
            "cells": [_cell(measured[setting.words].get(name)) for name in names],
            "bar": bar(ranking.figure(setting), low, high),
            "words": _spoken(ranking.figure(setting)),
            "letters": letters[rank - 1],
            "standing": against[rank - 1],
            "verdict": _verdict(setting),
        }
        for rank, setting in enumerate(ranking.settings, 1)
    ]
    return {
        "heading": " on ".join(filter(None, [ranking.threat, ranking.dataset])),
        "keys": [*keys],
        "names": [*names],
        "measure": robust(ranking.measure),
        "low": low,
        "high": high,
        "rows": rows,
        "verdicts": any(row["verdict"] for row in rows),
    }


def aligned(letters: Sequence[str]) -> list[str]:
    """Letters in columns, one for each letter that occurs."""
    columns = sorted({*"".join(letters)})
    return [
        "".join(column if column in each else " " for column in columns).rstrip()
        for each in letters
    ]


def scale(figures: Sequence[Figure]) -> tuple[float, float]:
    """The ends of an axis for some figures and their intervals: multiples of 10 %."""
    ends = [end for figure in figures for end in _ends(figure)]
    return math.floor(10 * min(ends)) / 10, math.ceil(10 * max(ends)) / 10


def bar(figure: Figure, low: float, high: float) -> dict[str, Any]:
    """Where a bar has the mean and both intervals, from 0 to `BAR`, on an axis from low to high."""

    def place(share: float) -> float:
        return round(BAR * (share - low) / (high - low), 2)

    return {
        "mean": place(figure.mean),
        "images": [*map(place, figure.over_images)],
        "seeds": None if figure.over_seeds is None else [*map(place, figure.over_seeds)],
    }


def _ends(figure: Figure) -> Iterator[float]:
    yield from figure.over_images
    yield from figure.over_seeds or ()


def _spoken(figure: Figure) -> str:
    low, high = figure.over_images
    words = f"{figure.mean:.1%}, over images {low:.1%} to {high:.1%}"
    if figure.over_seeds is not None:
        low, high = figure.over_seeds
        words += f", over seeds {low:.1%} to {high:.1%}"
    return words


def spread(figure: Figure) -> str:
    """The mean ± the standard deviation, in percent."""
    deviation = "" if figure.deviation is None else f" ± {100 * figure.deviation:.2f}"
    return f"{100 * figure.mean:.2f}{deviation}"


def _cell(figure: Figure | None) -> str:
    return "" if figure is None else spread(figure)


def _verdict(setting: Setting) -> str:
    """The worst verdict of an audit of a setting; empty if there was none."""
    found = {str(run.quoted.get("audit", "")) for run in setting.runs.values()}
    return max(found, key=("", "none", "pass", "warn", "fail").index).replace("none", "")


def link(run: Path, folder: Path) -> str:
    """The address of a run for a page in `folder`: its own page, or its directory."""
    inside = PAGE if (run / PAGE).is_file() else ""
    return quote(Path(os.path.relpath(run, folder), inside).as_posix()) + ("" if inside else "/")


# --- figures --------------------------------------------------------------------------------------


def _trade_offs(
    settings: Sequence[Setting], ranked: Sequence[Ranking], measured: Accuracies
) -> tuple[list[Picture], str]:
    several = [ranking for ranking in ranked if len(ranking.settings) > 1 and ranking.threats]
    tables = [
        (ranking, part)
        for ranking in several
        for _, part in trade_off(ranking, measured).groupby("robust", sort=False)
    ]
    key, values = _colour_key(settings)
    pictures = []
    for number, (ranking, part) in enumerate(tables[:MOST_FIGURES]):
        colours = [setting.keys.get(key, "") for setting in ranking.settings]
        coloured = part.assign(colour=[colours[rank - 1] for rank in part["rank"]])
        name = f"trade-off-{number}"
        pictures.append(drawing.trade_off(coloured, name, ranking.threat, key, values))
    return pictures, _missing(
        len(tables), "no two settings were attacked under the same threat model"
    )


def _colour_key(settings: Sequence[Setting]) -> tuple[str, list[str]]:
    """The first key whose values colours can tell apart, with its values, in their order.

    Settings with one value have one colour.
    """
    for key in dict.fromkeys(key for setting in settings for key in setting.keys):
        values = list(dict.fromkeys(setting.keys.get(key, "") for setting in settings))
        if 1 < len(values) <= len(CYCLE):
            return key, values
    return "", [""]


def _curves(settings: Sequence[Setting], measured: Accuracies) -> tuple[list[Picture], str]:
    parts = [
        (key, part)
        for key in axes.numeric_keys(settings)
        for _, part in _panels(axes.curves(settings, key, measured))
    ]
    pictures = [
        drawing.curves(part, f"curves-{number}", key)
        for number, (key, part) in enumerate(parts[:MOST_FIGURES])
    ]
    return pictures, _missing(len(parts), "no key has several numbers and few enough curves")


def _grids(settings: Sequence[Setting], measured: Accuracies) -> tuple[list[Picture], str]:
    parts = [
        (keys, part)
        for keys, table in axes.grids(settings, measured).items()
        for _, part in _panels(table[table["measure"] != CLEAN])
    ]
    pictures = [
        drawing.grid(part, f"grid-{number}", keys)
        for number, (keys, part) in enumerate(parts[:MOST_FIGURES])
    ]
    return pictures, _missing(len(parts), "no two keys have numbers in most combinations")


def _panels(table: pd.DataFrame) -> Iterator[tuple[Any, pd.DataFrame]]:
    return iter(table.groupby(["panel", "measure"], sort=False) if len(table) else ())


def _missing(count: int, reason: str) -> str:
    """The line below figures of which some or all are missing."""
    if not count:
        return f"left out, since {reason}."
    left = count - MOST_FIGURES
    return f"{left} more are left out; sweep.csv has their figures." if left > 0 else ""
