"""What figures have in common: their looks, and how a page embeds them.

Figures are made with matplotlib's objects, never with pyplot, and within `styled`, so that neither
changes what a user has set. A page has them as inline SVG, whose colours follow its theme.
"""

import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import pandas as pd
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from robusttrain.report.files import whole

# By name, as the style sheet defines them for light and dark pages. The hues are those of Okabe and
# Ito (2008), which people with any kind of colour blindness can tell apart.
COLOURS = {
    "ink": "#1b1f24",
    "muted": "#5c6670",
    "rule": "#d9dee3",
    "paper": "#fefefe",
    "blue": "#0072b2",
    "vermilion": "#d55e00",
    "green": "#009e73",
    "orange": "#e69f00",
    "purple": "#cc79a7",
    "sky": "#56b4e9",
    "grey": "#8a939c",
}
INK, MUTED, RULE, PAPER, BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY = COLOURS.values()

# Of lines and bars without a meaning of their own, in this order.
CYCLE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, INK)

# Inches: as wide as a column of the page, and still readable on a phone.
WIDTH, HEIGHT = 4.3, 2.9

# Dots per inch of the figures in `plots/`.
DPI = 160

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "figure.dpi": 72,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.2,
    "legend.borderaxespad": 0.0,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "patch.linewidth": 0.0,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "svg.fonttype": "none",
    "svg.hashsalt": "robusttrain",
    "pdf.fonttype": 42,
    # A `$` in the name of a class starts no formula.
    "text.parse_math": False,
}


@contextmanager
def styled() -> Iterator[None]:
    """Make and save figures within this block; the settings of the user come back after it."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        with warnings.catch_warnings():
            # Names in any script: a page has them as text, for which a browser has the letters.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            yield


class Room(NamedTuple):
    """Space around the axes of a figure for labels and the legend, in inches."""

    left: float = 0.55
    right: float = 0.1
    bottom: float = 0.5
    top: float = 0.15


def blank(width: float = WIDTH, height: float = HEIGHT, room: Room | None = None) -> Figure:
    """A figure without axes, of this size in inches.

    Without `room` its parts make room for each other, which takes a third of the time of drawing.
    """
    if room is None:
        figure = Figure(figsize=(width, height), layout="constrained")
    else:
        figure = Figure(figsize=(width, height))
        left, right = room.left / width, 1 - room.right / width
        figure.subplots_adjust(left, room.bottom / height, right, 1 - room.top / height)
    FigureCanvasAgg(figure)
    return figure


def axes(
    width: float = WIDTH, height: float = HEIGHT, room: Room | None = None
) -> tuple[Figure, Axes]:
    """A figure with one pair of axes and horizontal grid lines; see `blank`."""
    figure = blank(width, height, room)
    ax = figure.add_subplot()
    ax.grid(axis="y")
    return figure, ax


def legend_above(ax: Axes, columns: int = 3) -> None:
    """The legend, above the axes, where it covers nothing."""
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=columns)


def in_percent(ax: Axes, axis: str = "y") -> None:
    """Label an axis of shares from 0 to 1 in percent."""
    chosen = ax.yaxis if axis == "y" else ax.xaxis
    chosen.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))


@dataclass(frozen=True)
class Picture:
    """A figure, with what readers need who do not see it, or do not believe it.

    Parameters
    ----------
    name
        Of its files, and of its anchor in the page.
    title
        A short headline.
    caption
        A sentence or two below: what is drawn, and how to read it.
    alt
        What the figure shows, for readers who do not see it.
    figure
        The figure.
    data
        The values that are drawn. The page offers them as a table below the figure.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure
    data: pd.DataFrame

    @cached_property
    def svg(self) -> Markup:
        """The figure as an inline SVG element, in colours of the page."""
        return Markup(_inline(self._drawn, self.name, str(escape(self.alt))))

    def save(self, folder: Path, formats: Collection[str] = ("png", "svg")) -> None:
        """Write the figure to a folder, once in each of the formats png, svg and pdf."""
        for suffix in formats:
            with whole(folder / f"{self.name}.{suffix}") as path:
                path.write_bytes(self._saved(suffix))

    @cached_property
    def _drawn(self) -> str:
        drawn = StringIO()
        # `Figure.savefig` would draw everything twice.
        canvas: Any = FigureCanvasSVG(self.figure)
        with styled():
            canvas.print_svg(drawn, metadata={"Date": None})
        # Its parts have found their places.
        self.figure.set_layout_engine("none")
        return drawn.getvalue()

    def _saved(self, suffix: str) -> bytes:
        if suffix == "svg":
            return self._drawn.encode()
        _, drawn = self._drawn, BytesIO()
        with styled():
            if suffix == "png":
                self.figure.set_dpi(DPI)
                self.figure.set_facecolor("white")
                canvas: Any = FigureCanvasAgg(self.figure)
                canvas.print_png(drawn)
            else:
                self.figure.savefig(drawn, format=suffix, metadata={"CreationDate": None})
        return drawn.getvalue()


def _inline(document: str, name: str, alt: str) -> str:
    """The SVG element of a document as a page can have several: scaled, and with ids of its own."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None, "matplotlib writes it"
    head = (
        f'<svg {box[0]} role="img" aria-label="{alt}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    svg = head + svg[svg.index(">") + 1 :]
    used = set(re.findall(r'(?:url\(|xlink:href=")#([^)"]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(|xlink:href=")#', rf"\g<1>#{name}-", svg)
    # The family is that of the page.
    svg = re.sub(r"font: (?:(\d+|bold) )?([\d.]+)px [^;\"]*", r"font-size: \2px", svg)
    by_value = {value: f"var(--{key})" for key, value in COLOURS.items()}
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda m: by_value.get(m[0], m[0]), svg)
    return re.sub(r">\s+<", "><", svg).strip()
