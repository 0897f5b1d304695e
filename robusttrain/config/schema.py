"""Structured configs for Hydra, made from the dataclass of every component."""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from robusttrain.config.run_config import Config


class Group(NamedTuple):
    """A config group: where its components are defined, and the method that marks a component.

    `place` is a module, or a package of which every module is searched. `method` is None for
    settings, which only hold values: there every dataclass is a component.
    """

    place: str
    method: str | None


GROUPS = {
    "attack": Group("robusttrain.attacks", "__call__"),
    "averaging": Group("robusttrain.optim.averaging", "share"),
    "dataset": Group("robusttrain.data", "load"),
    "defense": Group("robusttrain.defenses", "outer"),
    "evaluation": Group("robusttrain.evaluation.settings", None),
    "logger": Group("robusttrain.loggers", "record"),
    "model": Group("robusttrain.models", "build"),
    "noise": Group("robusttrain.noise", "install"),
    "optimizer": Group("robusttrain.optim.optimizers", "build"),
    "schedule": Group("robusttrain.optim.schedules", "build"),
    "training": Group("robusttrain.training.settings", None),
    "weight_perturbation": Group("robusttrain.optim.weight_perturbation", "at"),
}


# Groups that extend a defense; a report appends their options to its name, except `NOTHING`.
COMPANIONS, NOTHING = ("weight_perturbation", "averaging"), "none"


# Keys in pixel units, which may be given as a fraction.
PIXEL_KEYS = ("eps", "step_size", "sigma")


def register() -> None:
    """Register the schema of every component with Hydra, as `schema/<group>/<class>`."""
    store = ConfigStore.instance()
    store.store(group="schema", name="Config", node=schema(Config))
    for group in GROUPS:
        for component in components(group):
            store.store(group=f"schema/{group}", name=component.__name__, node=schema(component))


def schema(component: type) -> type:
    """A structured config with the fields of a component, and its class as `_target_`."""
    hints = get_type_hints(component)
    target = ("_target_", str, dataclasses.field(default=_path(component)))
    members = [
        (member.name, *_schema_field(member, hints[member.name]))
        for member in dataclasses.fields(component)
        if member.init
    ]
    return dataclasses.make_dataclass(component.__name__, [target, *members])


def components(group: str) -> list[type]:
    """The dataclasses that an option of `group` can name: those with the method of the group.

    Abstract base classes are left out.
    """
    place, method = GROUPS[group]
    return [
        component
        for component in _dataclasses(importlib.import_module(place))
        if not inspect.isabstract(component) and (method is None or method in dir(component))
    ]


def schema_of(target: object) -> type | None:
    """The structured config of the class that a `_target_` names, if robusttrain defines it."""
    module, _, name = str(target).rpartition(".")
    if not module.startswith(f"{PACKAGE.name}."):
        return None
    component = getattr(importlib.import_module(module), name, None)
    known = isinstance(component, type) and dataclasses.is_dataclass(component)
    return schema(cast(type, component)) if known else None


def _dataclasses(place: ModuleType) -> Iterator[type]:
    """Public dataclasses of a module, or of the modules of a package."""
    inside = getattr(place, "__path__", None)
    names = [m.name for m in pkgutil.iter_modules(inside)] if inside else []
    modules = [importlib.import_module(f"{place.__name__}.{name}") for name in names] or [place]
    for module in modules:
        for name, value in vars(module).items():
            own = isinstance(value, type) and value.__module__ == module.__name__
            if own and dataclasses.is_dataclass(value) and not name.startswith("_"):
                yield cast(type, value)


def _schema_field(member: "dataclasses.Field[Any]", hint: Any) -> tuple[Any, Any]:
    if member.default_factory is hint and dataclasses.is_dataclass(hint):
        nested = schema(hint)
        return nested, dataclasses.field(default_factory=nested)
    if get_origin(hint) is Mapping and all(map(_is_plain, get_args(hint))):
        # Values by names that the user chooses.
        return Any, dataclasses.field(default_factory=_open_section)
    if member.default_factory is not dataclasses.MISSING:
        default = dataclasses.field(default_factory=member.default_factory)
    elif member.default is not dataclasses.MISSING:
        default = dataclasses.field(default=member.default)
    else:
        default = dataclasses.field(default="???")
    return (hint if member.name not in PIXEL_KEYS and _is_plain(hint) else Any), default


def _open_section() -> DictConfig:
    """A section that takes any key of the command line."""
    return OmegaConf.create({}, flags={"struct": False})


def _is_plain(hint: Any) -> bool:
    """Whether OmegaConf can check a type: scalars, enums, lists of them, and optional ones."""
    if get_origin(hint) in (Union, UnionType, list):
        return all(_is_plain(argument) for argument in get_args(hint))
    return hint in (bool, int, float, str, NoneType) or (
        inspect.isclass(hint) and issubclass(hint, Enum)
    )


def _path(component: type) -> str:
    return f"{component.__module__}.{component.__qualname__}"


PACKAGE = Path(__file__).parents[1]


# An installed package contains conf/; in a checkout, conf/ lies next to the package.
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())
