"""Refuse values and objects of another kind than the type hints of a component ask for."""

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from hydra.errors import HydraException
from hydra.utils import get_object
from torch import nn

from robusttrain.errors import InputError

# What a value of a plain type may be, and its name in messages.
PLAIN: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
    str: ((str,), "text"),
    Path: ((str, Path), "a path"),
    NoneType: ((NoneType,), "null"),
}


class _Misfit(NamedTuple):
    """A value that does not fit: its full key, and what its hint asks for."""

    key: str
    value: Any
    hint: Any


def refuse_values(node: Any, where: str = "") -> None:
    """Refuse values of a configuration that the component in whose section they are cannot take.

    Parameters
    ----------
    node
        A section as plain containers, with every reference replaced by its value.
    where
        Its full key.

    Raises
    ------
    InputError
        With the key and the value of the first misfit, such as a number in place of an attack.
    """
    if not isinstance(node, dict):
        return
    hints = _hints(node["_target_"]) if "_target_" in node else {}
    for key, value in node.items():
        for misfit in _misfits(_join(where, key), value, hints.get(key, Any)):
            shown = "null" if misfit.value is None else misfit.value
            raise InputError(misfit.key, shown, described(misfit.hint))
        refuse_values(value, _join(where, key))


def refuse_objects(node: Any, built: object, where: str = "") -> None:
    """Refuse what a `_target_` has built if it lacks what its place needs.

    Parameters
    ----------
    node
        The section that was built, as plain containers.
    built
        The object of it.
    where
        Its full key.

    Raises
    ------
    InputError
        With the `_target_` of the first object that does not fit.
    """
    hints = {} if isinstance(built, Mapping) else _hints(type(built))
    for key, below in node.items():
        if not isinstance(below, dict):
            continue
        part = built.get(key) if isinstance(built, Mapping) else getattr(built, key, ...)
        if part is None and "_target_" in below:
            raise _nothing(_join(where, key), below["_target_"])
        for misfit in _misfits(_join(where, key), part, hints.get(key, Any)):
            target = _select(node, misfit.key.removeprefix(f"{where}.")).get("_target_")
            if target is not None:
                raise _unfit(misfit, target)
        refuse_objects(below, part, _join(where, key))


def described(hint: Any) -> str:
    """What a type hint asks for, in words."""
    if hint in PLAIN:
        return PLAIN[hint][1]
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(described, get_args(hint)))
    if _is_mapping(hint):
        return f"names with {described(get_args(hint)[1])} for each"
    name = "torch.nn.Module" if hint is nn.Module else f"{hint.__module__}.{hint.__name__}"
    return f"a component like {name}"


def _unfit(misfit: _Misfit, target: str) -> InputError:
    if misfit.value is None:
        return _nothing(misfit.key, target)
    lacking = ", ".join(_missing(misfit.value, _alternatives(misfit.hint)[0]))
    problem = f"builds a value of type {type(misfit.value).__name__}, which has no {lacking}"
    return InputError(f"{misfit.key}._target_", target, described(misfit.hint), problem)


def _nothing(key: str, target: str) -> InputError:
    return InputError(key, allowed=f"{target} returned None", problem="builds no component")


def _misfits(key: str, value: Any, hint: Any) -> Iterator[_Misfit]:
    if _is_mapping(hint) and isinstance(value, Mapping):
        for name, below in value.items():
            yield from _misfits(f"{key}.{name}", below, get_args(hint)[1])
    elif not any(_fits(value, one) for one in _alternatives(hint)):
        yield _Misfit(key, value, hint)


def _fits(value: Any, hint: Any) -> bool:
    # A missing value is reported by its key, and a section is judged by what it builds.
    if isinstance(value, str) and value == "???":
        return True
    if hint in PLAIN:
        return isinstance(value, PLAIN[hint][0])
    if _is_mapping(hint):
        return isinstance(value, Mapping)
    if not _is_component(hint):
        return True
    if isinstance(value, dict):
        return True
    return not _missing(value, hint)


def _missing(value: object, hint: Any) -> list[str]:
    """The members of a component that `value` lacks; a class that is no protocol is one member."""
    if not getattr(hint, "_is_protocol", False):
        is_one = not _is_component(hint) or isinstance(value, hint)
        return [] if is_one else [hint.__name__]
    return [name for name in _members(hint) if not hasattr(value, name)]


def _members(protocol: type) -> list[str]:
    names = dict.fromkeys(
        name
        for base in protocol.__mro__
        if getattr(base, "_is_protocol", False) and base.__module__ != "typing"
        for name in [*vars(base), *inspect.get_annotations(base)]
    )
    return [name for name in names if name == "__call__" or not name.startswith("_")]


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is_mapping(hint: Any) -> bool:
    origin = get_origin(hint)
    return inspect.isclass(origin) and issubclass(origin, Mapping) and bool(get_args(hint))


def _is_component(hint: Any) -> bool:
    ours = inspect.isclass(hint) and hint.__module__.partition(".")[0] == "robusttrain"
    return hint is nn.Module or (ours and not hasattr(hint, "__members__"))


def _hints(target: Any) -> dict[str, Any]:
    """The type hints of the arguments of a class or function, which may be given by its name.

    A default may contradict its hint, as in `attack: Attack = None`; such an argument has none.
    """
    try:
        called = get_object(target) if isinstance(target, str) else target
        hints = get_type_hints(called.__init__ if inspect.isclass(called) else called)
        parameters = inspect.signature(called).parameters
    # Whatever is wrong with a class, building it reports it.
    except (HydraException, ImportError, AttributeError, NameError, TypeError, ValueError):
        return {}
    return {
        key: hint
        for key, hint in hints.items()
        if key in parameters and not (parameters[key].default is None and not _allows_none(hint))
    }


def _allows_none(hint: Any) -> bool:
    return any(_fits(None, one) for one in _alternatives(hint))


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else str(key)


def _select(node: Any, key: str) -> Any:
    for name in key.split("."):
        node = node.get(name, {}) if isinstance(node, dict) else {}
    return node if isinstance(node, dict) else {}
