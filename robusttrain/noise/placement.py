"""Places of noise: the input, the first layer, a layer by name, or all layers with weights."""

import difflib
from types import UnionType

from torch import nn

from robusttrain.errors import InputError
from robusttrain.noise.layer import NoiseLayer, attach

INPUT, FIRST = "input", "first"


Kinds = type[nn.Module] | UnionType

WEIGHTED: Kinds = nn.Conv2d | nn.Linear


def layers_for(noise: str, model: nn.Module, kinds: Kinds = WEIGHTED) -> list[nn.Module]:
    """The layers of `model` of the given kinds, in the order of their registration.

    Raises
    ------
    InputError
        If there are none; the message names the `noise` that needs them.
    """
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    if not layers:
        what = "a convolution" if kinds is nn.Conv2d else "a layer with weights"
        raise InputError("noise", noise, "the model has none", f"needs {what}")
    return layers


def put(layer: NoiseLayer, model: nn.Module, at: str) -> None:
    """Add noise to the input, or to the output of a layer.

    `at` is `input`, `first` (the first layer with weights), or the name of a layer.

    Raises
    ------
    InputError
        If `model` has no such layer.
    """
    # Looked up before anything is added, so that a refusal does not change the model.
    place = model if at == INPUT else _layer(model, at)
    attach(model, layer, place)
    if at == INPUT:
        place.register_forward_pre_hook(layer.before)
    else:
        place.register_forward_hook(layer.after)


def _layer(model: nn.Module, at: str) -> nn.Module:
    names: dict[str, nn.Module] = {name: m for name, m in model.named_modules() if name}
    weighted = [module for module in model.modules() if isinstance(module, WEIGHTED)]
    if at == FIRST and weighted:
        return weighted[0]
    if at not in names:
        near = difflib.get_close_matches(at, names, 3, 0.4) or list(names)[:3]
        allowed = ", ".join([INPUT, FIRST, *near])
        allowed = f"{INPUT}, {FIRST} or a layer of the model ({allowed} are there)"
        raise InputError("noise.at", at, allowed)
    return names[at]
