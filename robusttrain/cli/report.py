"""`robusttrain report`. It imports neither Hydra nor torch, so that it starts fast."""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from robusttrain.errors import InputError
from robusttrain.run_directory import RECORDS

DESCRIPTION = """\
Make the page of finished runs again: report.html, and its figures in plots/, in
the directory of each run. A page is made of the files of the run alone, also of
runs of earlier versions. What these did not write is left out, and the page
says so. Prints the path of each page.

Of a sweep, the page is sweep.html. With --latex, --markdown or --csv, a table
of its settings is printed instead: for a paper, or as numbers."""

EXAMPLES = """\
examples:
  robusttrain report outputs/2026-01-31/12-00-00-000000
  robusttrain report outputs/2026-01-31/* --pdf
  robusttrain report outputs/sweeps/2026-01-31/12-00-00-000000 --latex"""

# Tables of a sweep, by their options.
TABLES = {"latex": "in LaTeX", "markdown": "in Markdown", "csv": "as CSV, in long form"}


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see robusttrain report --help)")


def report(arguments: Sequence[str]) -> None:
    """Run `robusttrain report`; exit with code 1 and a one-line message on invalid input."""
    try:
        chosen = _parser().parse_intermixed_args(arguments)
        if not chosen.run:
            raise InputError("report", allowed="robusttrain report RUN ...", problem="needs a run")
        for folder in chosen.run:
            print(_of_sweep(folder, chosen) if _is_sweep(folder) else _of_run(folder, chosen))
    except InputError as error:
        sys.exit(f"robusttrain: {error}")


def _parser() -> ArgumentParser:
    parser = _Parser(
        "robusttrain report",
        usage="robusttrain report DIR ... [--pdf | --latex | --markdown | --csv]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "run", nargs="*", type=Path, metavar="DIR", help="directory of a run or of a sweep"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--pdf", action="store_true", help="also write the figures of a run as PDF")
    for name, words in TABLES.items():
        output.add_argument(
            f"--{name}", dest="table", action="store_const", const=name,
            help=f"print the table of a sweep {words}",
        )  # fmt: skip
    return parser


def _is_sweep(folder: Path) -> bool:
    return (folder / RECORDS).is_dir()


def _of_run(folder: Path, chosen: Namespace) -> Path:
    if chosen.table:
        allowed = "give the directory of a sweep"
        raise InputError(f"--{chosen.table} {folder}", allowed=allowed, problem="is a run")
    # Imported here, since the help needs no figures.
    from robusttrain.report.run.page import write_page

    with _writable(folder):
        formats = ("png", "svg", "pdf") if chosen.pdf else ("png", "svg")
        return write_page(folder, formats=formats)


def _of_sweep(folder: Path, chosen: Namespace) -> Path | str:
    if chosen.pdf:
        allowed = "its figures are in the page"
        raise InputError(f"--pdf {folder}", allowed=allowed, problem="is a sweep")
    # Imported here, since the help needs no figures.
    from robusttrain.sweeps.sweep_page import rewrite
    from robusttrain.sweeps.tables import table_of

    if chosen.table:
        return table_of(folder, chosen.table)
    with _writable(folder):
        return rewrite(folder)


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = str(error.strerror or error)
        raise InputError(str(folder), allowed=reason, problem="cannot be written to") from error
