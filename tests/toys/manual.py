"""The manual as data: its fenced blocks, and its tables."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
MANUAL = ROOT / "docs"

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language and its lines."""

    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        return self.text.splitlines() if self.language == "sh" else []

    @property
    def file(self) -> str | None:
        """The path in a comment on its first line, if it is (a part of) a file."""
        found = re.match(r"# ([\w/.]+\.\w+)\n", self.text)
        return found[1] if found else None


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in FENCE.findall(page.read_text())]


def pages() -> dict[str, Path]:
    """Every page that has commands or code, by its path in the manual."""
    found = {str(path.relative_to(MANUAL)): path for path in sorted(MANUAL.rglob("*.md"))}
    return {name: path for name, path in found.items() if blocks(path)}


def words(command: str) -> list[str]:
    """What stands behind `robusttrain`, however it is started, and before a redirection."""
    given = shlex.split(command.partition(" > ")[0])
    return given[given.index("robusttrain") + 1 :]


def section(page: Path, heading: str) -> str:
    """The text under a heading, up to the next one of its level or above."""
    found = re.search(
        rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#{{1,2}} |\Z)", page.read_text(), re.M | re.S
    )
    assert found is not None, heading
    return found[2]


def rows(text: str) -> list[dict[str, str]]:
    """The first table in a text, a row for each line."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    head, _, *body = cells
    return [dict(zip(head, line, strict=True)) for line in body]
