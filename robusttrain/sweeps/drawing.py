"""The figures of a sweep's page, each from the table that the page offers below it."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from robusttrain.errors import printable
from robusttrain.report.ledger import Floats
from robusttrain.report.page.figures import (
    CYCLE,
    GREY,
    INK,
    PAPER,
    Picture,
    axes,
    in_percent,
    legend_above,
    styled,
)

# Values of a key that span this factor are drawn on a logarithmic axis.
LOGARITHMIC = 50

# More intervals of points cover each other.
MOST_INTERVALS = 15

# In inches: the height of a row of a grid, and of a line of a legend.
ROW, LINE = 0.42, 0.17

# Characters that are as wide as a figure.
LONGEST = 38

# A colour map whose lightness rises steadily, also for people with any kind of colour blindness.
COLOUR_MAP = "cividis"


def trade_off(
    table: pd.DataFrame, name: str, threat: str, key: str, values: Sequence[str]
) -> Picture:
    """Clean against robust accuracy.

    Parameters
    ----------
    table
        The rows of `tradeoff.trade_off` of one robust accuracy, and a column `colour`: the value of
        `key` of each setting.
    name
        The name of the picture.
    threat
        The threat model.
    key, values
        The key that colours distinguish, and its values in the order of the colours. The key is
        empty if there is none.
    """
    robust = as_adjective(table["robust"].iloc[0])
    front = table[table["front"]].sort_values("clean")
    is_crowded = len(table) > MOST_INTERVALS
    with styled():
        figure, ax = axes(height=3.4 + _legend_height(values if key else ()))
        ax.grid(axis="x")
        ax.plot(front["clean"], front["accuracy"], color=GREY, linewidth=1, zorder=1, gid="front")
        for value, part in table.groupby("colour", sort=False):
            colour = CYCLE[values.index(value)]
            _bars(ax, part[part["front"]] if is_crowded else part, colour)
            _points(ax, part, colour)
        for value in values if key else ():
            ax.plot([], [], "o", color=CYCLE[values.index(value)], label=short(value))
        _number(ax, front)
        ax.set(xlabel="clean accuracy", ylabel=f"{robust} accuracy")
        in_percent(ax, "x")
        in_percent(ax, "y")
        if key:
            legend_above(ax, _columns(values))
    captions = [f"Colours are the values of {key}."] if key else []
    captions += ["Only the front has its intervals."] if is_crowded else []
    return Picture(
        name,
        f"Clean against {robust} accuracy: {threat}",
        " ".join(captions),
        printable(
            f"Scatter plot of {len(table)} settings. On the front: {', '.join(front['setting'])}."
        ),
        figure,
        table.drop(columns=["robust", "colour"]),
    )


def as_adjective(accuracy: str) -> str:
    """The name of an accuracy, before the word accuracy."""
    return accuracy.replace(" ", "-")


def _bars(ax: Axes, part: pd.DataFrame, colour: str) -> None:
    for over, width in (("images", 0.8), ("seeds", 2.2)):
        ax.errorbar(
            part["clean"], part["accuracy"], fmt="none", ecolor=colour, elinewidth=width,
            alpha=0.45, zorder=2, xerr=_errors(part, "clean", f"clean_{over}"),
            yerr=_errors(part, "accuracy", over),
        )  # fmt: skip


def _points(ax: Axes, part: pd.DataFrame, colour: str) -> None:
    for is_front, kept in part.groupby("front"):
        ax.plot(
            kept["clean"], kept["accuracy"], "o", color=colour, zorder=3,
            markerfacecolor=colour if is_front else PAPER, gid="points",
        )  # fmt: skip


def _number(ax: Axes, front: pd.DataFrame) -> None:
    """Write the rank of each setting on the front beside its point."""
    for row in front.to_dict("records"):
        ax.annotate(
            str(row["rank"]), (row["clean"], row["accuracy"]), xytext=(5, 5),
            textcoords="offset points", fontsize=8, color=INK,
        )  # fmt: skip


def _errors(part: pd.DataFrame, middle: str, ends: str) -> Floats:
    """How far the ends of an interval are from the middle, (2, N); NaN where there is none."""
    middles = part[middle].to_numpy()
    low, high = part[f"{ends}_low"].to_numpy(), part[f"{ends}_high"].to_numpy()
    # Rounding may put an end on the wrong side of the middle.
    errors: Floats = np.maximum(0, np.stack([middles - low, high - middles]))
    return errors


def curves(table: pd.DataFrame, name: str, key: str) -> Picture:
    """An accuracy over a numeric key: the rows of `axes.curves` of one panel and one measure."""
    measure, panel = as_adjective(table["measure"].iloc[0]), table["panel"].iloc[0]
    lines = [*table.groupby("curve", sort=False)]
    with styled():
        names = [str(label) for label, _ in lines]
        figure, ax = axes(height=2.6 + _legend_height(names))
        for colour, (label, line) in zip(CYCLE, lines, strict=False):
            ax.plot(
                line["x"],
                line["accuracy"],
                "o-",
                color=colour,
                label=short(str(label)),
                gid="curve",
            )
            ax.fill_between(
                line["x"], line["low"], line["high"], color=colour, alpha=0.15, linewidth=0
            )
        _scale(ax, table["x"].unique().tolist())
        ax.set(xlabel=short(key), ylabel=f"{measure} accuracy")
        in_percent(ax)
        if len(lines) > 1:
            legend_above(ax, _columns(names))
    over = " or ".join(table["interval"].unique())
    return Picture(
        name,
        _title(f"{measure.capitalize()} accuracy over {key}", panel),
        f"Bands are 95 % intervals {over}.",
        printable(f"Line plot with {len(lines)} curves over {key}; {measure} {_range(table)}."),
        figure,
        table.drop(columns=["panel", "measure"]),
    )


def _scale(ax: Axes, values: Sequence[float]) -> None:
    """Ticks at the values, if they are few; a logarithmic axis if they span a wide range."""
    if min(values) > 0 and max(values) > LOGARITHMIC * min(values):
        ax.set_xscale("log")
    if len(values) <= 8:
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.minorticks_off()


def grid(table: pd.DataFrame, name: str, keys: tuple[str, str]) -> Picture:
    """An accuracy over two numeric keys: the rows of `axes.grids` of one panel and one measure."""
    measure, panel = as_adjective(table["measure"].iloc[0]), table["panel"].iloc[0]
    cells = table.pivot_table(index="y", columns="x", values="accuracy")
    with styled():
        figure, ax = axes(height=1.1 + ROW * len(cells))
        ax.grid(visible=False)
        ax.pcolormesh(
            cells.to_numpy(), cmap=COLOUR_MAP, edgecolors=PAPER, linewidth=1.5, gid="cells"
        )
        _write(ax, cells)
        for ticks, values in ((ax.set_xticks, cells.columns), (ax.set_yticks, cells.index)):
            ticks(np.arange(len(values)) + 0.5, [f"{value:g}" for value in values])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set(xlabel=short(keys[0]), ylabel=short(keys[1]))
    return Picture(
        name,
        _title(f"{measure.capitalize()} accuracy over {keys[0]} and {keys[1]}", panel),
        "",
        printable(
            f"Heat map of {cells.size} combinations of {keys[0]} and {keys[1]}; "
            f"{measure} {_range(table)}."
        ),
        figure,
        table.drop(columns=["panel", "measure", "low", "high", "interval"]),
    )


def _write(ax: Axes, cells: pd.DataFrame) -> None:
    """Write each accuracy into its cell, dark on light and light on dark."""
    shares = cells.to_numpy()
    middle = (np.nanmin(shares) + np.nanmax(shares)) / 2
    for (row, column), share in np.ndenumerate(shares):
        if not np.isnan(share):
            ax.text(
                column + 0.5, row + 0.5, f"{100 * share:.1f}", ha="center", va="center",
                fontsize=8, color="black" if share > middle else "white",
            )  # fmt: skip


def short(name: str) -> str:
    """A name as a figure has room for it; the values below the figure have the whole name."""
    name = printable(name)
    half = (LONGEST - 1) // 2
    return name if len(name) <= LONGEST else f"{name[:half]}…{name[-half:]}"


def _columns(names: Sequence[str]) -> int:
    """How many columns of a legend fit side by side."""
    longest = max(len(short(name)) for name in names)
    return max(1, min(3, LONGEST // (longest + 4)))


def _legend_height(names: Sequence[str]) -> float:
    """The height of a legend, in inches."""
    return LINE * math.ceil(len(names) / _columns(names)) if names else 0.0


def _range(table: pd.DataFrame) -> str:
    return f"accuracy from {table['accuracy'].min():.1%} to {table['accuracy'].max():.1%}"


def _title(title: str, panel: str) -> str:
    return f"{title}: {panel}" if panel else title
