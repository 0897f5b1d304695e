"""Random weights that a network starts with."""

import math
from enum import StrEnum

from torch import nn

from robusttrain.errors import InputError
from robusttrain.models.blocks import weights_of


class Initialisation(StrEnum):
    """The random weights that a network starts with.

    `usual` are those that its layers draw for themselves. `ibp` keeps the width of interval bounds
    from layer to layer (Shi et al. 2021, "Fast certified robust training with short warmup", eq.
    12): the weights of each layer but the last one are normal, with mean 0 and standard deviation
    sqrt(2 pi) / n for n inputs of a neuron.
    """

    usual = "usual"
    ibp = "ibp"


def initialise(model: nn.Module, kind: Initialisation) -> None:
    """Draw the weights of `model` from torch's global stream, as `kind` says.

    Raises
    ------
    InputError
        If `kind` is `ibp` and the model has no weights before the last layer.
    """
    if kind is Initialisation.usual:
        return
    weights = weights_of(model)[:-1]
    if not weights:
        problem = "has no effect on a model without weights before its last layer"
        raise InputError("initialisation", kind, problem=problem)
    for weight in weights:
        nn.init.normal_(weight, 0.0, math.sqrt(2 * math.pi) / weight[0].numel())
