"""Docstrings as they are written here, turned into reStructuredText.

They are plain text: `code` stands between single backticks, and |x|, a_ and * are what they look
like. Only the sections of numpydoc, lists and indented examples have a meaning.
"""

import inspect
import re
from collections.abc import Iterator
from enum import Enum

from sphinx.application import Sphinx

CODE = re.compile(r"(``[^`]+``|`[^`]+`)")
# What reStructuredText would take for a substitution, emphasis or a reference.
MARKUP = re.compile(r"([|*\\]|(?<=\w)_(?!\w))")


def as_rst(text: str) -> str:
    """A line or paragraph of a docstring, with literals marked and everything else escaped."""
    parts = CODE.split(text)
    return "".join(
        _code(part) if CODE.fullmatch(part) else MARKUP.sub(r"\\\1", part) for part in parts
    )


def _code(span: str) -> str:
    return f"``{span.strip('`')}``"


def paragraphs(docstring: str) -> list[str]:
    """A docstring without the numpydoc sections at its end, by paragraphs on one line each."""
    text = re.split(r"\n\n?\w[\w ]*\n-{3,}\n", docstring)[0]
    return [" ".join(block.split()) for block in text.split("\n\n")]


def _lines(lines: list[str]) -> Iterator[str]:
    session = block = False
    for position, line in enumerate(lines):
        session = line.startswith(">>>") or (session and bool(line.strip()))
        block = block and (not line.strip() or line.startswith("    "))
        verbatim = session or block
        opens = line.endswith(":") and _opens_a_block(lines[position + 1 : position + 3])
        block = block or opens
        yield line if verbatim else as_rst(line) + ":" * opens


def _opens_a_block(following: list[str]) -> bool:
    """Whether an empty line and an indented one follow."""
    return len(following) == 2 and not following[0].strip() and following[1].startswith("    ")


def translate(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Rewrite the docstring of one object in place."""
    lines[:] = list(_lines(lines))


def restore(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Undo what napoleon does to properties: it takes the words before a colon for a type."""
    if what == "property":
        lines[:] = list(_lines((inspect.getdoc(thing) or "").splitlines()))


def without_arguments(
    app: Sphinx, what: str, name: str, thing: object, options: object, signature: str, returns: str
) -> tuple[str, str] | None:
    """Protocols are not called, and enumerations not with what Python shows."""
    bare = getattr(thing, "_is_protocol", False) or (
        inspect.isclass(thing) and issubclass(thing, Enum)
    )
    return ("", "") if what == "class" and bare else None


def setup(app: Sphinx) -> dict[str, bool]:
    # Before napoleon, whose own output must not be escaped, and behind it.
    app.connect("autodoc-process-docstring", translate, priority=100)
    app.connect("autodoc-process-docstring", restore, priority=900)
    app.connect("autodoc-process-signature", without_arguments)
    return {"parallel_read_safe": True}
