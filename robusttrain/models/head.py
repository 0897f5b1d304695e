"""Which parameters of a network are its head, the last layer, whose outputs are the logits."""

import inspect

from torch import nn

# The part of a name below which torch keeps the tensors that a parametrized one is computed from.
_PARAMETRIZED = "parametrizations."


def head_of(model: nn.Module, num_classes: int) -> list[str]:
    """The names of the parameters of the head of `model`, in the order of `named_parameters`.

    A network of timm names its head itself (`get_classifier`). Any other head is the module of the
    last weight, of 2 or more dimensions, whose first dimension is `num_classes`, with whatever a
    parametrization computes that weight from.

    Parameters
    ----------
    model
        The network, which may be wrapped in others.
    num_classes
        The number of its logits.

    Returns
    -------
    list[str]
        Empty if there is no such weight.

    Examples
    --------
    >>> head_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), num_classes=3)
    ['2.weight', '2.bias']
    """
    parameters = dict(model.named_parameters())
    named = _named_by_model(model)
    if named:
        return [name for name, parameter in parameters.items() if id(parameter) in named]
    weights = [
        name
        for name, parameter in parameters.items()
        if parameter.ndim >= 2 and len(parameter) == num_classes
    ]
    if not weights:
        return []
    module = module_of(weights[-1])
    return [
        name
        for name, parameter in parameters.items()
        if module_of(name) == module
        and (_PARAMETRIZED in name or parameter.shape[:1] == (num_classes,))
    ]


def module_of(name: str) -> str:
    """The path of the module that a parameter or buffer belongs to; empty for the model itself.

    >>> module_of("stem.fc.weight"), module_of("stem.fc.parametrizations.weight.original0")
    ('stem.fc', 'stem.fc')
    """
    above, parametrized, _ = name.partition(_PARAMETRIZED)
    return above.rstrip(".") if parametrized else name.rpartition(".")[0]


def _named_by_model(model: nn.Module) -> set[int]:
    """The identities of the parameters of the head that a network of timm names."""
    for module in model.modules():
        get_classifier = getattr(module, "get_classifier", None)
        if inspect.ismethod(get_classifier):
            named: object = get_classifier()
            # Networks trained by distillation have two heads.
            heads = named if isinstance(named, tuple | list) else (named,)
            modules = [head for head in heads if isinstance(head, nn.Module)]
            return {id(parameter) for head in modules for parameter in head.parameters()}
    return set()
