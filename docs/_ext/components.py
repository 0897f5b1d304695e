"""`.. components:: GROUP` and `.. choices::`: what a configuration can name, from docstrings."""

import dataclasses
import inspect
from collections.abc import Iterator
from enum import Enum
from typing import Any, get_args, get_type_hints

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from robusttrain.config import schema


def parsed(directive: SphinxDirective, lines: list[str]) -> list[nodes.Node]:
    """The nodes of some reStructuredText, parsed in place of the directive."""
    return directive.parse_text_to_nodes(
        "\n".join(lines), offset=directive.content_offset, allow_section_headings=True
    )


def path(component: type) -> str:
    return f"{component.__module__}.{component.__qualname__}"


class Components(SphinxDirective):
    """Every class of a group, sorted by name."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        found = sorted(schema.components(self.arguments[0]), key=lambda each: each.__name__)
        lines = []
        for component in found:
            lines += [f".. autoclass:: {path(component)}", ""]
        return parsed(self, lines)


class Choices(SphinxDirective):
    """Every enumeration that a field of a component takes, sorted by path."""

    def run(self) -> list[nodes.Node]:
        used = {enum for group in schema.GROUPS for enum in _enums(schema.components(group))}
        lines = []
        for enum in sorted(used, key=path):
            lines += [f".. autoclass:: {path(enum)}", "   :members:", "   :undoc-members:", ""]
        return parsed(self, lines)


def _enums(components: list[type]) -> Iterator[type[Enum]]:
    for component in components:
        hints = get_type_hints(component)
        for field in dataclasses.fields(component):
            yield from filter(_is_enum, _leaves(hints[field.name]))


def _leaves(hint: Any) -> Iterator[Any]:
    yield hint
    for argument in get_args(hint):
        yield from _leaves(argument)


def _is_enum(hint: Any) -> bool:
    return inspect.isclass(hint) and issubclass(hint, Enum)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("components", Components)
    app.add_directive("choices", Choices)
    return {"parallel_read_safe": True}
