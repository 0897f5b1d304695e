"""The result of an evaluation: its tables, and what is printed, saved and shown of them."""

import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from io import BytesIO, StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console

from robusttrain.report import proofs
from robusttrain.report.checks import titled
from robusttrain.report.files import write_arrays, write_csv, write_json
from robusttrain.report.identity import digests
from robusttrain.report.radii import medians
from robusttrain.report.terminal import Terminal, report_cells
from robusttrain.run_directory import (
    ADVERSARIAL,
    AUDIT,
    CERTIFIED,
    CURVE,
    GALLERY,
    MANIFEST,
    RADII,
    REPORT,
    SAMPLES,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# How wide the text of a result is, and how fine its figure in a notebook.
WIDTH, PIXELS_AN_INCH = 80, 110


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """What an evaluation found, as the tables that a run writes.

    `print(result)` shows the figures as text, and a notebook shows them as a table. The columns are
    those of the CSV files of the same names, which the manual describes.

    Parameters
    ----------
    table
        A row for each attack, and the worst case: `report.csv`.
    samples
        A row for each image: `samples.csv`.
    audit
        A row for each check of the audit; empty if there was none: `audit.csv`.
    curve
        A row for each point of the curves over radii and steps: `curve.csv`.
    certified
        A row for each certified image; empty without certification: `certified.csv`.
    radii
        A row for each image and norm; empty if no radii were searched: `radii.csv`.
    adversarial
        NumPy arrays of the adversarial images by name, as in `adversarial.npz`; None if they were
        not kept.
    gallery
        NumPy arrays of the examples that a page shows, by name, as in `gallery.npz`.
    provenance
        What `manifest.json` has of the evaluation: settings, seed, versions, device, data.
    paper
        The theorem behind the certificates, if there are any.
    """

    table: pd.DataFrame
    samples: pd.DataFrame
    audit: pd.DataFrame
    curve: pd.DataFrame
    certified: pd.DataFrame = field(default_factory=pd.DataFrame)
    radii: pd.DataFrame = field(default_factory=pd.DataFrame)
    adversarial: Mapping[str, Any] | None = None
    gallery: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    paper: str = ""

    @property
    def title(self) -> str:
        """What was evaluated on what."""
        first = self.table.iloc[0]
        trained = f"{first['defense']}, " if first["defense"] else ""
        return f"{trained}{first['model']} on {first['dataset']}"

    def save(self, folder: Path | str) -> Path:
        """Write the result as the files of a run, which `load_run` and `compare` read.

        Files of an earlier result in the same folder are replaced. Returns the folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Without a manifest the folder counts as unfinished until all its files are written.
        for name in (MANIFEST, ADVERSARIAL, GALLERY, CERTIFIED, RADII, CURVE, AUDIT):
            (folder / name).unlink(missing_ok=True)
        self.write(folder)
        write_json(folder / MANIFEST, {**self.provenance, "files": digests(folder)})
        return folder

    def write(self, folder: Path) -> None:
        """Write the tables, and the adversarial images if they were kept."""
        if not self.certified.empty:
            write_csv(folder / CERTIFIED, self.certified)
        if not self.radii.empty:
            write_csv(folder / RADII, self.radii)
        write_csv(folder / SAMPLES, self.samples)
        if self.adversarial is not None:
            write_arrays(folder / ADVERSARIAL, self.adversarial)
        if self.gallery is not None:
            write_arrays(folder / GALLERY, self.gallery)
        if not self.curve.empty:
            write_csv(folder / CURVE, self.curve)
        if not self.audit.empty:
            write_csv(folder / AUDIT, self.audit)
        write_csv(folder / REPORT, self.table)

    def html(self, path: Path | str) -> Path:
        """Write the page of the result: one file, with figures, examples and the audit in words.

        Returns its path.
        """
        # Imported here and below, since Matplotlib takes a second.
        from robusttrain.report.run.page import write_page

        with self._folder() as folder:
            return write_page(folder, Path(path), formats=())

    def figure(self, name: str = "eps") -> "Figure":
        """A figure of the page, as a figure of Matplotlib.

        Parameters
        ----------
        name
            `eps` and `steps` (accuracy over the radius and the steps of an attack), `draws` (for
            random models), `radii`, `classes`, `confusion`, `margins`, `sizes`, `attacks`,
            `certified`, `status` (for verified images), and `training` for a run.

        Raises
        ------
        InputError
            If there is no figure of this name, or nothing to draw in it.
        """
        from robusttrain.report.run.page import figure

        with self._folder() as folder:
            return figure(folder, name)

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """A directory with the files of the result, for the block."""
        with TemporaryDirectory() as folder:
            yield self.save(folder)

    def show(self, terminal: Terminal) -> None:
        """Print the figures: the table comes last, since it has those to quote."""
        for row in rows_of(self.table[self.table["invalid"] > 0]):
            if row["audit"] == "":
                terminal.warn(_invalid(row))
        if not self.audit.empty:
            terminal.audit(titled(rows_of(self.audit)), AUDIT)
        if "status" in self.samples:
            terminal.say(proofs.line(self.samples))
        certified = self.curve[self.curve["curve"] == "certified"]
        if not certified.empty:
            terminal.certified(certified, self.paper)
        proven = {*self.curve.loc[self.curve["curve"] == "proven", "norm"]}
        for median in medians(self.radii):
            without = "" if median.norm in proven else "; nothing is proven: no bounds"
            terminal.say(f"{median}{without}")
        terminal.report(self.table, self.title)

    def __str__(self) -> str:
        text = StringIO()
        console = Console(file=text, width=WIDTH, color_system=None, highlight=False)
        self.show(Terminal(console, logs=False))
        return text.getvalue().strip("\n")

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """The table, the checks of the audit that do not pass, and the curve, for notebooks."""
        table = report_cells(self.table).to_html(index=False, justify="left", border=0)
        doubts = self.audit[self.audit["verdict"] != "pass"]
        checks = "" if doubts.empty else doubts.to_html(index=False, justify="left", border=0)
        verdict = f"<p>audit: {self.table['audit'].iloc[-1]}</p>"
        curve = "" if self.curve.empty else _as_image(self.figure("eps"))
        return f"<p><b>{escape(self.title)}</b></p>{table}{verdict}{checks}{curve}"


def _as_image(figure: "Figure") -> str:
    file = BytesIO()
    figure.savefig(file, format="png", dpi=PIXELS_AN_INCH)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="accuracy over the radius" src="data:image/png;base64,{data}">'


def rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table, by the names of its columns."""
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _invalid(row: Mapping[str, Any]) -> str:
    return (
        f"{row['attack']} returned {row['invalid']:.0f} invalid images, which count as not "
        f"broken: an attack has to return finite images of the shape and type that it is "
        f"given, in [0, 1] and within {row['norm']}, eps {row['eps']:.6g}"
    )
