"""The allowed values of the fields of a component, as its own error messages state them.

Ranges are written down once, where they are checked. This module builds each component with extreme
values, and reads the ranges from the errors. It does not need Sphinx.
"""

import dataclasses
from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from robusttrain.attacks.pgd import PGD, Start
from robusttrain.errors import InputError

# Values of fields without a default, where None would be refused.
REQUIRED = {"attack": PGD(start=Start.gaussian), "name": "mnist"}

FAR = 10**9


def allowed_values(component: type) -> dict[str, str]:
    """What each field accepts, by name; without fields that accept every value of their type."""
    hints = get_type_hints(component)
    stated = {
        field.name: "; ".join(_refusals(component, field.name, hints[field.name]))
        for field in dataclasses.fields(component)
        if field.init
    }
    return {name: text for name, text in stated.items() if text}


def required(component: type) -> dict[str, Any]:
    """Values for the fields of `component` that have no default."""
    missing = dataclasses.MISSING
    return {
        field.name: REQUIRED.get(field.name)
        for field in dataclasses.fields(component)
        if field.init and field.default is missing and field.default_factory is missing
    }


def _refusals(component: type, name: str, hint: Any) -> list[str]:
    """What the errors allow that extreme values of a field raise, each once."""
    found = []
    for value in _extremes(hint):
        try:
            component(**required(component) | {name: value})
        except InputError as error:
            if error.key == name:
                found.append(error.allowed.removeprefix("a finite number").lstrip(", "))
    return list(dict.fromkeys(found))


def _extremes(hint: Any) -> Iterator[Any]:
    """Values of a type that every range excludes, on either side."""
    for kind in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        if kind in (int, float):
            yield from (-FAR, FAR)
        elif kind is str:
            yield "?"
        elif get_origin(kind) is list:
            yield []
            yield from ([value] for value in _extremes(get_args(kind)[0]))
