"""Build the objects of a composed configuration; errors name the full key."""

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any, cast

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from robusttrain.config.declarations import original
from robusttrain.config.misfits import refuse_objects, refuse_values
from robusttrain.config.model_section import divided
from robusttrain.config.run_config import Config
from robusttrain.config.schema import GROUPS, PIXEL_KEYS, RADII
from robusttrain.errors import InputError

# Where the keys of a model for its weights are built, and by which class.
INITIAL_WEIGHTS = "initial_weights"
WEIGHTS = "robusttrain.checkpoints.initial_weights.InitialWeights"


def with_numbers(config: DictConfig) -> DictConfig:
    """A copy of the configuration in which fractions such as 8/255 are numbers.

    Members of enumerations, which were declared for the schema, become those of the component.

    Raises
    ------
    InputError
        If a key in pixel units is neither a number nor a fraction.
    """
    plain = OmegaConf.to_container(config, resolve=False)
    return cast(DictConfig, OmegaConf.create(_with_numbers(plain, "")))


def build(config: DictConfig) -> Config:
    """Build every component; nothing is loaded or computed yet.

    Raises
    ------
    InputError
        If a component rejects a value; the message starts with the full key.
    """
    for group in GROUPS:
        if "_target_" not in config[group]:
            raise InputError(group, allowed="its YAML has no _target_", problem="names no class")
    section = divided(config.model)
    apart = copy.deepcopy(config)
    apart.model = section.own
    apart[INITIAL_WEIGHTS] = {"_target_": WEIGHTS, **section.weights}
    try:
        built = cast(Config, build_component(apart))
    except InputError as error:
        # The user knows these keys in the section of the model only.
        raise error.of(error.key.replace(f"{INITIAL_WEIGHTS}.", "model.")) from error
    evaluation = built.evaluation.under_each(built.threat, built.evaluated)
    return dataclasses.replace(built, model=section.around(built.model), evaluation=evaluation)


def build_model_section(config: DictConfig) -> dict[str, Any]:
    """Build the components of a part of a configuration that has a section `model`.

    The keys that belong to no architecture have no effect, apart from a normalisation.

    Raises
    ------
    InputError
        As `build_component`.
    """
    section, apart = divided(config.model), copy.deepcopy(config)
    apart.model = section.own
    parts: dict[str, Any] = build_component(apart)
    return {**parts, "model": section.around(parts["model"])}


def build_component(config: DictConfig) -> Any:
    """Build the object that a node with a `_target_` describes.

    Raises
    ------
    InputError
        If a value or a `_target_` does not fit its place, or a component rejects a value.
    """
    plain = OmegaConf.to_container(config, resolve=True)
    refuse_values(plain)
    try:
        built = instantiate(config, _convert_="all")
    except InstantiationException as error:
        raise _refusal(config, error) from error
    refuse_objects(plain, built)
    return built


@contextmanager
def named_in(config: Mapping[str, Any], *sections: str) -> Iterator[None]:
    """Give an `InputError` of the block its full key, if that is a key of one of the sections.

    Parameters
    ----------
    config
        A whole configuration as plain containers, with its references.
    sections
        Their keys, such as `dataset`.
    """
    try:
        yield
    except InputError as error:
        composed = OmegaConf.create(dict(config))
        for section in sections:
            first = error.key.partition(".")[0]
            if first in (OmegaConf.select(composed, section) or {}):
                raise _at_its_source(composed, section, error) from error
        raise


def _with_numbers(node: Any, where: str) -> Any:
    if isinstance(node, dict):
        return {
            key: _pixels(f"{where}{key}", value)
            if key in PIXEL_KEYS
            else _radii(f"{where}{key}", value)
            if key == RADII and isinstance(value, dict)
            else _with_numbers(value, f"{where}{key}.")
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [_with_numbers(value, where) for value in node]
    return original(type(node))[node.name] if isinstance(node, Enum) else node


def _radii(where: str, radii: dict[str, Any]) -> dict[str, Any]:
    """The radii of several threat models, by their norms."""
    return {norm: _pixels(f"{where}.{norm}", eps) for norm, eps in radii.items()}


def _pixels(key: str, value: Any) -> Any:
    """Parse a number or a fraction; keep interpolations and an omitted step size as they are."""
    left_out = value is None and key.endswith("step_size")
    if left_out or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    if isinstance(value, str) and (value == "???" or "${" in value):
        return value
    try:
        numerator, _, denominator = str(value).partition("/")
        return float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        allowed = "a number or a fraction such as 0.03 or 8/255"
        raise InputError(key, value, allowed) from None


def _refusal(config: DictConfig, error: InstantiationException) -> InputError:
    """The error of a component, with its full key, from the exception that Hydra wrapped."""
    found = re.search(r"full_key: (\S+)", str(error))
    where = found[1] if found else ""
    cause = error.__cause__
    if isinstance(cause, InputError):
        return _at_its_source(config, where, cause)
    # If a class cannot be imported, the second line of Hydra's message has the reason.
    reason = " ".join(str(cause or error).splitlines()[:2])
    problem = "cannot be built"
    return InputError(where or "config", allowed=reason or type(cause).__name__, problem=problem)


def _at_its_source(config: DictConfig, where: str, error: InputError) -> InputError:
    """An error in the node `where`, under the key that the rejected value was taken from."""
    where = _source(config, where)
    node = OmegaConf.select(config, where) if where else config
    if error.key in node and OmegaConf.is_interpolation(node, error.key):
        return error.of(_referred(node, error.key))
    return error.under(where)


def _source(config: DictConfig, where: str) -> str:
    """The key of the node `where`, with a node that is a reference replaced by what it names."""
    place = ""
    for name in where.split(".") if where else ():
        parent = OmegaConf.select(config, place) if place else config
        is_reference = OmegaConf.is_interpolation(parent, name)
        place = _referred(parent, name) if is_reference else f"{place}.{name}".removeprefix(".")
    return place


def _referred(node: DictConfig, key: str) -> str:
    """The key of which the value of `key` is the value."""
    plain = cast("dict[str, str]", OmegaConf.to_container(node, resolve=False))
    return plain[key].removeprefix("${").removesuffix("}")
