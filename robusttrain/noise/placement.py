"""Where noise goes: the input, the first layer, a layer by its name, or all layers with weights."""

import difflib

from torch import nn

from robusttrain.errors import InputError
from robusttrain.noise import NoiseLayer, attach

INPUT, FIRST = "input", "first"


def weighted_layers(model: nn.Module) -> list[nn.Module]:
    """Convolutions and linear layers, in the order of their registration."""
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def put(layer: NoiseLayer, model: nn.Module, at: str) -> None:
    """Add noise at the input (`input`), behind the first layer with weights (`first`), or a name.

    Raises
    ------
    InputError
        If `model` has no layer of that name.
    """
    # Found before anything is added, so that a refusal leaves the model as it was.
    place = model if at == INPUT else _layer(model, at)
    attach(model, layer)
    if at == INPUT:
        place.register_forward_pre_hook(layer.before)
    else:
        place.register_forward_hook(layer.after)


def _layer(model: nn.Module, at: str) -> nn.Module:
    names: dict[str, nn.Module] = {name: m for name, m in model.named_modules() if name}
    weighted = weighted_layers(model)
    if at == FIRST and weighted:
        return weighted[0]
    if at not in names:
        near = difflib.get_close_matches(at, names, 3, 0.4) or list(names)[:3]
        allowed = ", ".join([INPUT, FIRST, *near])
        raise InputError(
            f"at={at} is not allowed: it must be {INPUT}, {FIRST} or a layer of the model"
            f" ({allowed} are there)"
        )
    return names[at]
