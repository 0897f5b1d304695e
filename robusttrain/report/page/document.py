"""HTML from templates: whatever stands in a run is shown as text."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from robusttrain.errors import printable
from robusttrain.report.files import whole
from robusttrain.report.page import formats


@cache
def environment() -> Environment:
    """The templates of `robusttrain/report/`, with escaping, and the filters that they share."""
    made = Environment(
        loader=PackageLoader("robusttrain.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Control characters, such as escape codes of terminals, are shown, and never written.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    made.filters |= {
        "percent": formats.percent,
        "interval": formats.interval,
        "figure": formats.figure,
        "duration": formats.duration,
    }
    made.tests |= {"unknown": formats.is_unknown, "a_number": formats.is_number}
    return made


def render(template: str, **content: Any) -> str:
    """The page of a template, by its path in `robusttrain/report/`."""
    return environment().get_template(template).render(content)


def write(path: Path, page: str) -> None:
    """Write a page, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
