"""Whose classes are built from a configuration that somebody else has saved."""

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from robusttrain.errors import InputError

# Packages whose classes may be built from a configuration that somebody else has saved.
TRUSTED = ("robusttrain",)


# What a value in it may refer to: another key, or a variable of the environment. Other resolvers of
# OmegaConf make nodes out of text, and with them classes that nobody has looked at.
REFERENCE = re.compile(r"\$\{([\w.]+|oc\.env:[\w.,/ -]+)\}")


# What messages call it.
CONFIGURATION = "the checkpoint's configuration"


def refuse_strangers(node: Any, trusted: Sequence[str]) -> None:
    for key, value in _leaves(node):
        if key == "_target_" and not _is_class_of(str(value), trusted):
            problem = f"would build {value}, which is no class of robusttrain"
            allowed = "if you trust it, name its package in trust=[...]"
            raise InputError(CONFIGURATION, allowed=allowed, problem=problem)
        if "${" in REFERENCE.sub("", str(value)):
            allowed = "only references to other keys are allowed there"
            raise InputError(CONFIGURATION, allowed=allowed, problem=f"would compute {value}")


def _is_class_of(target: str, packages: Sequence[str]) -> bool:
    """Whether a dotted name is a class that one of `packages` defines.

    A prefix alone proves nothing: every module of a package also holds what it imports.
    """
    module, _, name = target.rpartition(".")
    if module.partition(".")[0] not in packages:
        return False
    try:
        value = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return False
    return inspect.isclass(value) and value.__module__.partition(".")[0] in packages


def _leaves(node: Any, key: object = "") -> Iterator[tuple[object, Any]]:
    """(key, value) of all that is no container; what a sequence holds goes by the key of that."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _leaves(value, name)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _leaves(value, key)
    else:
        yield key, node
