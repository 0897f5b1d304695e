"""Structured configs for Hydra, made from the dataclass of every component.

Hydra finds the schema of a class as `schema/<group>/<class>`, and that of a whole run as
`schema/Config`. All are made when Hydra asks for them, from declarations that are read without
importing torch.
"""

import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Mapping
from enum import Enum
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from robusttrain.config.declarations import class_names, declared, modules, original, source
from robusttrain.config.folders import PACKAGE


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
PIXEL_KEYS = ("eps", "eps_margin", "step_size", "sigma")

# The key of radii by their norms.
RADII = "threats"


class Schemas(ConfigSource):
    """Hydra's source of the schemas."""

    @staticmethod
    def scheme() -> str:
        """The beginning of its address on the search path."""
        return "robusttrain"

    def available(self) -> bool:
        """Always: it is a part of the program."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Whether the path is `schema` or `schema/<group>`."""
        return config_path.rstrip("/") in {"", "schema", *(f"schema/{group}" for group in GROUPS)}

    def is_config(self, config_path: str) -> bool:
        """Whether the path is that of a schema."""
        return _component(config_path) is not None

    def load_config(self, config_path: str) -> ConfigResult:
        """The schema of a path."""
        component = _component(config_path)
        assert component is not None, "Hydra asks for what `is_config` has confirmed"
        address = f"{self.scheme()}://{self.path}"
        node = OmegaConf.structured(schema(component))
        return ConfigResult(self.provider, address, node, {"package": None})

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Nothing: no user needs their names."""
        return []


class _OnSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("robusttrain", f"{Schemas.scheme()}://")


def register() -> None:
    """Let Hydra find the schemas."""
    for plugin in (Schemas, _OnSearchPath):
        Plugins.instance().register(plugin)


@functools.cache
def _component(config_path: str) -> type | None:
    """The component whose schema a path is; None if it is no schema."""
    match config_path.removesuffix(".yaml").split("/"):
        case ["schema", "Config"]:
            return cast(type, declared("robusttrain.config.run_config", "Config"))
        case ["schema", group, name] if group in GROUPS:
            place, method = GROUPS[group]
            found = re.compile(rf"^class {re.escape(name)}\b", re.MULTILINE)
            defining = (module for module in modules(place) if found.search(source(module)))
            components = (declared(module, name) for module in defining)
            return next((one for one in components if _is_component(one, method)), None)
    return None


@functools.cache
def schema(component: type) -> type:
    """A structured config with the fields of a component, and its class as `_target_`."""
    hints = get_type_hints(component)
    target = ("_target_", str, dataclasses.field(default=_path(component)))
    members = [
        (member.name, *_schema_field(member, hints[member.name]))
        for member in dataclasses.fields(component)
        # Fields with metadata have their keys elsewhere.
        if member.init and not member.metadata
    ]
    return dataclasses.make_dataclass(component.__name__, [target, *members])


def components(group: str) -> list[type]:
    """The dataclasses that an option of `group` can name, imported; see `_is_component`."""
    place, method = GROUPS[group]
    public = [
        declared(module, name)
        for module in modules(place)
        for name in class_names(module)
        if not name.startswith("_")
    ]
    return [original(found) for found in public if _is_component(found, method)]


def _is_component(found: type, method: str | None) -> bool:
    """Whether a class is a dataclass with the method of its group, and not abstract."""
    fits = dataclasses.is_dataclass(found) and (method is None or method in dir(found))
    return fits and not inspect.isabstract(found)


def schema_of(target: object) -> type | None:
    """The structured config of the class that a `_target_` names, if robusttrain defines it."""
    module, _, name = str(target).rpartition(".")
    if not module.startswith(f"{PACKAGE.name}."):
        return None
    component = getattr(importlib.import_module(module), name, None)
    known = isinstance(component, type) and dataclasses.is_dataclass(component)
    return schema(cast(type, component)) if known else None


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
