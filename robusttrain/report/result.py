"""The result of an evaluation: its tables, and what is printed, saved and shown of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from robusttrain.report.files import write_arrays, write_csv, write_json
from robusttrain.report.identity import digests
from robusttrain.report.terminal import Terminal, report_cells
from robusttrain.run_directory import (
    ADVERSARIAL,
    AUDIT,
    CERTIFIED,
    CURVE,
    GALLERY,
    MANIFEST,
    REPORT,
    SAMPLES,
)

# How wide the text of a result is.
WIDTH = 80


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
        for name in (MANIFEST, ADVERSARIAL, GALLERY, CERTIFIED, CURVE, AUDIT):
            (folder / name).unlink(missing_ok=True)
        self.write(folder)
        write_json(folder / MANIFEST, {**self.provenance, "files": digests(folder)})
        return folder

    def write(self, folder: Path) -> None:
        """Write the tables, and the adversarial images if they were kept."""
        if not self.certified.empty:
            write_csv(folder / CERTIFIED, self.certified)
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

    def show(self, terminal: Terminal) -> None:
        """Print the figures: the table comes last, since it has those to quote."""
        for row in rows_of(self.table[self.table["invalid"] > 0]):
            if row["audit"] == "":
                terminal.warn(_invalid(row))
        if not self.audit.empty:
            terminal.audit(rows_of(self.audit), AUDIT)
        certified = self.curve[self.curve["curve"] == "certified"]
        if not certified.empty:
            terminal.certified(certified, self.paper)
        terminal.report(self.table, self.title)

    def __str__(self) -> str:
        text = StringIO()
        console = Console(file=text, width=WIDTH, color_system=None, highlight=False)
        self.show(Terminal(console, logs=False))
        return text.getvalue().strip("\n")

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """The table and the verdict of the audit, for notebooks."""
        table = report_cells(self.table).to_html(index=False, justify="left", border=0)
        doubts = self.audit[self.audit["verdict"] != "pass"]
        checks = "" if doubts.empty else doubts.to_html(index=False, justify="left", border=0)
        return f"<p><b>{escape(self.title)}</b></p>{table}{checks}"


def rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table, by the names of its columns."""
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _invalid(row: Mapping[str, Any]) -> str:
    return (
        f"{row['attack']} returned {row['invalid']:.0f} invalid images, which count as not "
        f"broken: an attack has to return finite images of the shape and type that it is "
        f"given, in [0, 1] and within {row['norm']}, eps {row['eps']:.6g}"
    )
