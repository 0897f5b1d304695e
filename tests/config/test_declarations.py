"""What is read from the source of a component is what its class has, and takes no torch."""

import dataclasses
import inspect
import subprocess
import sys
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from robusttrain.config import schema
from robusttrain.config.declarations import declared, original
from robusttrain.config.run_config import Config

COMPONENTS = [Config, *(each for group in schema.GROUPS for each in schema.components(group))]


def described(value: Any) -> Any:
    """A type, a default or a list of them, such that copies of an enumeration are equal."""
    if isinstance(value, Enum):
        return described(type(value)), value.name, value.value
    if isinstance(value, list):
        return [described(each) for each in value]
    if inspect.isclass(value) and issubclass(value, Enum):
        return value.__module__, value.__qualname__, [member.value for member in value]
    if inspect.isclass(value) and dataclasses.is_dataclass(value):
        return fields(value)
    return (get_origin(value), *map(described, get_args(value))) if get_args(value) else value


def fields(structured: type) -> dict[str, tuple[Any, Any]]:
    """The type and the default of each field of a structured config."""
    hints = get_type_hints(structured)
    return {
        member.name: (described(hints[member.name]), described(_default(member)))
        for member in dataclasses.fields(structured)
    }


def _default(member: "dataclasses.Field[Any]") -> Any:
    made = member.default_factory is not dataclasses.MISSING and member.default_factory()
    return member.default if member.default is not dataclasses.MISSING else repr(made)


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.__name__)
def test_the_schema_of_the_source_is_that_of_the_class(component: type) -> None:
    copy = declared(component.__module__, component.__name__)
    assert copy is not component
    assert original(copy) is component
    assert fields(schema.schema(copy)) == fields(schema.schema(component))


# Imports nothing that is slow, composes, and asks for the schema of each class of each group.
COMPOSES = """
import sys, hydra
from robusttrain.cli import main
from robusttrain.config import schema
from robusttrain.config.folders import CONF
schema.register()
with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
    for words in {words}:
        hydra.compose("config", words)
print({slow} & set(sys.modules))
"""


def test_a_configuration_is_composed_without_what_is_slow_to_import() -> None:
    words = [["evaluation=full", "noise=smoothing", "model=torchvision", "dataset=folder"]]
    slow = {"torch", "scipy", "pandas", "rich", "sklearn", "statsmodels", "PIL"}
    program = COMPOSES.format(words=words, slow=slow)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")
