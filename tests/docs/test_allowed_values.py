"""The allowed values in the configuration reference, against those that components accept."""

import dataclasses
import importlib
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any, get_origin

import pytest

from robusttrain.attacks.apgd import APGD
from robusttrain.config import schema
from robusttrain.config.run_config import Config
from robusttrain.data.torchvision import Torchvision
from robusttrain.errors import InputError
from robusttrain.noise.dropout import Dropout
from robusttrain.optim.optimizers import Adam
from robusttrain.training.curriculum import Curriculum
from toys.manual import MANUAL

COMPONENTS = [Config, Curriculum, *(c for group in schema.GROUPS for c in schema.components(group))]

# A pattern of the text, and from its numbers values that are accepted and values that are refused.
FORMS: dict[str, Callable[..., tuple[list[float], list[float]]]] = {
    r"(\d+) or more": lambda low: ([low, low + 1], [low - 1]),
    r"above (\d+)": lambda low: ([low + 1], [low, low - 1]),
    r"from (\d+) to (\d+)": lambda low, high: ([low, high], [low - 1, high + 1]),
    r"from (\d+) to below (\d+)": lambda low, high: ([low], [low - 1, high]),
    r"between (\d+) and (\d+), both excluded": lambda low, high: ([(low + high) / 2], [low, high]),
}


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(MANUAL / "_ext")
        return importlib.import_module("allowed_values")


@pytest.mark.parametrize(
    ("component", "name", "stated"),
    [
        (APGD, "steps", "1 or more"),
        (APGD, "rho", "between 0 and 1, both excluded"),
        (Dropout, "p", "from 0 to below 1"),
        (Adam, "lr", "above 0"),
        (Config, "eps", "0 or more; at most 1 in linf"),
        (Torchvision, "name", "one of mnist, fashion_mnist, kmnist, cifar10, cifar100, svhn"),
    ],
)
def test_the_allowed_values_are_stated(
    component: type, name: str, stated: str, extension: ModuleType
) -> None:
    assert extension.allowed_values(component)[name] == stated


def is_accepted(component: type, name: str, value: Any, extension: ModuleType) -> bool:
    try:
        component(**extension.required(component) | {name: value})
    except InputError as error:
        # Another field may be refused because of this value.
        return error.key != name
    return True


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.__name__)
def test_a_component_accepts_what_is_stated_and_nothing_else(
    component: type, extension: ModuleType
) -> None:
    fields = {field.name: field for field in dataclasses.fields(component)}
    for name, stated in extension.allowed_values(component).items():
        for form, values in FORMS.items():
            found = re.fullmatch(form, stated)
            if found is None:
                continue
            accepted, refused = values(*map(int, found.groups()))
            is_list = get_origin(fields[name].type) is list
            for value in [*accepted, *refused]:
                given = [value] if is_list else value
                taken = is_accepted(component, name, given, extension)
                assert taken == (value in accepted), (name, value)


def test_most_numbers_have_a_range(extension: ModuleType) -> None:
    """A number without one is deliberate: any seed, and any mean of the channels."""
    hints = {int, float, int | None, float | None, list[int], list[float]}
    free = {
        f"{component.__name__}.{field.name}"
        for component in COMPONENTS
        for field in dataclasses.fields(component)
        if field.init and field.type in hints and component is not Config
        if field.name not in extension.allowed_values(component)
    }
    assert free == {
        "Arrays.seed", "Folder.seed", "HuggingFace.seed", "Synthetic.seed", "PreActResNet.mean",
        "WideResNet.mean",
    }  # fmt: skip
