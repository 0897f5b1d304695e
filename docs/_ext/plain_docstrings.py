"""Convert the docstrings of this project to reStructuredText.

They are plain text: `code` is in single backticks, and |x|, a_ and * are literal characters. Only
numpydoc sections, lists and indented examples are markup.
"""

import inspect
import re
from collections.abc import Iterator
from enum import Enum

from sphinx.application import Sphinx

CODE = re.compile(r"(``[^`]+``|`[^`]+`)")
# Characters that reStructuredText would read as a substitution, emphasis or a reference.
MARKUP = re.compile(r"([|*\\]|(?<=\w)_(?!\w))")


def as_rst(text: str) -> str:
    """A line or paragraph of a docstring, with literals marked up and everything else escaped."""
    parts = CODE.split(text)
    return "".join(
        _code(part) if CODE.fullmatch(part) else MARKUP.sub(r"\\\1", part) for part in parts
    )


def _code(span: str) -> str:
    return f"``{span.strip('`')}``"


def paragraphs(docstring: str) -> list[str]:
    """The paragraphs of a docstring, one line each, without the numpydoc sections at its end."""
    text = re.split(r"\n\n?\w[\w ]*\n-{3,}\n", docstring)[0]
    return [" ".join(block.split()) for block in text.split("\n\n")]


def _lines(lines: list[str]) -> Iterator[str]:
    session = block = False
    for position, line in enumerate(lines):
        session = line.startswith(">>>") or (session and bool(line.strip()))
        block = block and (not line.strip() or line.startswith("    "))
        verbatim = session or block
        opens = not verbatim and _opens_a_block(*lines[position : position + 3])
        block = block or opens
        yield line if verbatim else _marked_up(line) + _block_mark(line) * opens


def _marked_up(line: str) -> str:
    bullet = re.match(r"\s*[*-] ", line)
    start = bullet[0] if bullet else ""
    return start + as_rst(line.removeprefix(start))


def _block_mark(line: str) -> str:
    """What turns the indented lines that follow into a literal block."""
    return ":" if line.endswith(":") else " ::"


def _opens_a_block(line: str, *following: str) -> bool:
    """Whether an empty line and an indented one follow a line that is not indented itself."""
    return (
        line[:1].strip() != ""
        and len(following) == 2
        and not following[0].strip()
        and following[1].startswith("    ")
    )


def translate(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Rewrite the docstring of one object in place."""
    lines[:] = list(_lines(lines))


def restore(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Undo what napoleon does to properties: it reads the words before a colon as a type."""
    if what == "property":
        lines[:] = list(_lines((inspect.getdoc(thing) or "").splitlines()))


def without_arguments(
    app: Sphinx, what: str, name: str, thing: object, options: object, signature: str, returns: str
) -> tuple[str, str] | None:
    """Show no arguments of protocols, which are not called, and of enumerations."""
    bare = getattr(thing, "_is_protocol", False) or (
        inspect.isclass(thing) and issubclass(thing, Enum)
    )
    return ("", "") if what == "class" and bare else None


def without_fields(
    app: Sphinx, what: str, name: str, thing: object, skip: bool, options: object
) -> bool | None:
    """Leave out the fields of named tuples: the docstring of the class explains them."""
    return True if type(thing).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> dict[str, bool]:
    # `translate` runs before napoleon, whose output must not be escaped, and `restore` after it.
    app.connect("autodoc-process-docstring", translate, priority=100)
    app.connect("autodoc-process-docstring", restore, priority=900)
    app.connect("autodoc-process-signature", without_arguments)
    app.connect("autodoc-skip-member", without_fields)
    return {"parallel_read_safe": True}
