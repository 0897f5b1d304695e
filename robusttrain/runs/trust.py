"""Which classes a saved configuration may build; it may come from somebody else."""

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from robusttrain.errors import InputError

# Packages whose classes every saved configuration may build.
TRUSTED = ("robusttrain",)


# References that its values may contain: to another key or to an environment variable. Other
# resolvers of OmegaConf can create nodes from text, and with them classes that were not checked.
REFERENCE = re.compile(r"\$\{([\w.]+|oc\.env:[\w.,/ -]+)\}")


# How messages refer to it.
CONFIGURATION = "the checkpoint's configuration"


def refuse_untrusted(node: Any, trusted: Sequence[str]) -> None:
    """Refuse classes that no `trusted` package defines, and resolvers other than references.

    Raises
    ------
    InputError
        If a value in `node` names such a class or resolver.
    """
    for key, value in _leaves(node):
        if key == "_target_" and not _is_class_of(str(value), trusted):
            problem = f"would build {value}, which is not a class of robusttrain"
            allowed = "if you trust it, name its package in trust=[...]"
            raise InputError(CONFIGURATION, allowed=allowed, problem=problem)
        if "${" in REFERENCE.sub("", str(value)):
            allowed = "only references to keys and environment variables are allowed there"
            raise InputError(CONFIGURATION, allowed=allowed, problem=f"would compute {value}")


def _is_class_of(target: str, packages: Sequence[str]) -> bool:
    """Whether a dotted name is a class that one of `packages` defines.

    The prefix of the name proves nothing: a module also contains what it imports.
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
    """(key, value) of everything but containers; the elements of a sequence have its key."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _leaves(value, name)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _leaves(value, key)
    else:
        yield key, node
