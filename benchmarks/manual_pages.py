"""Tables that benchmarks write into pages of the manual, between marks."""

from collections.abc import Sequence
from pathlib import Path

END = "<!-- end -->"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table, of which the first line is the header."""
    header, *others = lines
    rows = [header, ["---"] * len(header), *others]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def replace_between(page: Path, start: str, end: str, text: str) -> None:
    """Put `text` in place of what is between the marks `start` and `end` of a page."""
    before, _, rest = page.read_text().partition(start)
    after = rest.partition(end)[2]
    page.write_text(f"{before}{start}\n\n{text}\n\n{end}{after}")
