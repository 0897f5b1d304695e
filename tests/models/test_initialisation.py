"""Random weights for training on bounds: their distribution, and what they are for."""

import math

import pytest
import torch
from torch import nn

from robusttrain.bounds.intervals import Interval
from robusttrain.errors import InputError
from robusttrain.models.initialisation import Initialisation, initialise


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten(1), nn.Linear(64, 400), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Linear(400, 400), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(400, 10))


def test_weights_are_normal_with_the_deviation_of_the_paper() -> None:
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Linear(500, 10))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    initialise(model, Initialisation.ibp)
    weight = model[0].weight
    deviation = math.sqrt(2 * math.pi) / (8 * 9)
    assert weight.std().item() == pytest.approx(deviation, rel=0.05)
    assert abs(weight.mean().item()) < 0.1 * deviation
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name != "0.weight"), name


def test_the_width_of_bounds_stays_from_layer_to_layer() -> None:
    """As derived in the paper: the radius behind a ReLU has the mean of that before the layer."""
    box = Interval.around(torch.full((20, 1, 8, 8), 0.5), 0.1)
    growth = {}
    for kind in Initialisation:
        model = network()
        initialise(model, kind)
        with torch.no_grad():
            growth[kind] = (model[:-1](box).radius.mean() / box.radius.mean()).item()
    assert 0.5 < growth[Initialisation.ibp] < 2
    assert growth[Initialisation.usual] > 100


def test_a_model_without_hidden_weights_is_refused() -> None:
    with pytest.raises(InputError, match=r"^initialisation=ibp has no effect"):
        initialise(nn.Sequential(nn.Flatten(1), nn.Linear(4, 2)), Initialisation.ibp)
