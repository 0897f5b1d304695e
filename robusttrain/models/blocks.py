"""The blocks of a network, from its input to its head."""

import re
from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from robusttrain.models.head import head_of
from robusttrain.noise.layer import noise_layers

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

# The name of a tensor that another one is computed from, up to the name of the other one.
_PARAMETRIZED = re.compile(r"parametrizations\.(\w+)\.\w+$")


def blocks_of(model: nn.Module, num_classes: int) -> list[list[str]]:
    """The names of the parameters of each block of `model`, in the order of registration.

    The last block is the head (`head_of`). The others are found from the model downward: its
    children are blocks, except those that are opened, whose children take their place. Opened are

    - containers (`nn.Sequential`, `nn.ModuleList`, `nn.ModuleDict`) with two or more weights, that
      is, parameters of two or more axes outside of normalisation layers: a convolution with its
      normalisation is one block;
    - modules with a container, at any depth, that lists two or more modules of two or more weights
      each, as an encoder lists its transformer layers;
    - at the top, a module that has all parameters except those of the head, such as a wrapper.

    A block without weights, such as a normalisation layer, belongs to the block before it.
    Parameters of opened modules, such as position embeddings, belong to the first block. Parameters
    of noise belong to none.

    Examples
    --------
    >>> blocks_of(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)), num_classes=3)
    [['0.weight', '0.bias', '1.weight', '1.bias'], ['2.weight', '2.bias']]
    """
    of_noise = noise_parameters(model)
    parameters = {n: p for n, p in model.named_parameters() if id(p) not in of_noise}
    weights = set(map(id, weights_of(model)))
    head = [name for name in head_of(model, num_classes) if name in parameters]
    for name in head:
        del parameters[name]
    places = list(_below(*innermost(model, list(parameters))))
    members: dict[str, list[str]] = {place: [] for place in places}
    leading: list[str] = []
    for name in parameters:
        place = next((place for place in places if name.startswith(f"{place}.")), None)
        (leading if place is None else members[place]).append(name)
    blocks: list[list[str]] = []
    for names in filter(None, members.values()):
        if any(id(parameters[name]) in weights for name in names):
            blocks.append(leading + names)
            leading = []
        elif blocks:
            blocks[-1] += names
        else:
            leading = leading + names
    if leading:
        blocks.append(leading)
    return [*blocks, head] if head else blocks


def noise_parameters(model: nn.Module) -> set[int]:
    """The identities of the parameters of noise."""
    return {id(p) for layer in noise_layers(model) for p in layer.parameters()}


def norm_parameters(model: nn.Module) -> set[int]:
    """The identities of the parameters of normalisation layers."""
    norms = (module for module in model.modules() if isinstance(module, _NORMS))
    return {id(parameter) for norm in norms for parameter in norm.parameters()}


def plain_name(name: str) -> str:
    """The name of a parameter, or of the tensor that a parametrization computes from it.

    >>> plain_name("stem.parametrizations.weight.original0")
    'stem.weight'
    """
    return _PARAMETRIZED.sub(r"\1", name)


def innermost(model: nn.Module, names: Sequence[str]) -> tuple[nn.Module, str]:
    """The innermost module, not a layer, that has all parameters of `names`; and its path.

    The path is empty for the model itself, and otherwise ends with a dot.
    """
    for name, child in model.named_children():
        inside = all(parameter.startswith(f"{name}.") for parameter in names)
        if inside and any(True for _ in child.children()):
            below = [parameter.removeprefix(f"{name}.") for parameter in names]
            module, path = innermost(child, below)
            return module, f"{name}.{path}"
    return model, ""


def _below(module: nn.Module, path: str) -> Iterator[str]:
    for name, child in module.named_children():
        if _is_opened(child):
            yield from _below(child, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def _is_opened(module: nn.Module) -> bool:
    if isinstance(module, _CONTAINERS):
        return len(weights_of(module)) > 1
    lists = (part for part in module.modules() if isinstance(part, _CONTAINERS))
    return any(sum(map(_is_compound, part.children())) > 1 for part in lists)


def _is_compound(module: nn.Module) -> bool:
    return not isinstance(module, _CONTAINERS) and len(weights_of(module)) > 1


def weights_of(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of two or more axes outside of normalisation layers.

    Those of noise are among them.
    """
    # The scale of layer norm has the axes of the activations, which may be several.
    of_norms = norm_parameters(module)
    return [p for p in module.parameters() if p.dim() > 1 and id(p) not in of_norms]
