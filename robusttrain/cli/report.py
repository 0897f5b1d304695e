"""`robusttrain report`. It imports neither Hydra nor torch, so that it starts fast."""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from robusttrain.errors import InputError

DESCRIPTION = """\
Make the page of finished runs again: report.html, and its figures in plots/, in
the directory of each run. A page is made of the files of the run alone, also of
runs of earlier versions. What these did not write is left out, and the page
says so. Prints the path of each page."""

EXAMPLES = """\
examples:
  robusttrain report outputs/2026-01-31/12-00-00-000000
  robusttrain report outputs/2026-01-31/* --pdf"""


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see robusttrain report --help)")


def report(arguments: Sequence[str]) -> None:
    """Run `robusttrain report`; exit with code 1 and a one-line message on invalid input."""
    try:
        chosen = _parser().parse_intermixed_args(arguments)
        if not chosen.run:
            raise InputError("report", allowed="robusttrain report RUN ...", problem="needs a run")
        formats = ("png", "svg", "pdf") if chosen.pdf else ("png", "svg")
        for folder in chosen.run:
            print(_written(folder, formats))
    except InputError as error:
        sys.exit(f"robusttrain: {error}")


def _parser() -> ArgumentParser:
    parser = _Parser(
        "robusttrain report",
        usage="robusttrain report RUN [RUN ...] [--pdf]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", nargs="*", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--pdf", action="store_true", help="also write the figures as PDF")
    return parser


def _written(folder: Path, formats: Sequence[str]) -> Path:
    # Imported here, since the help needs no figures.
    from robusttrain.report.run.page import write_page

    try:
        return write_page(folder, formats=formats)
    except OSError as error:
        reason = str(error.strerror or error)
        raise InputError(str(folder), allowed=reason, problem="cannot be written to") from error
