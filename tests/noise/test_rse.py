"""Random self-ensemble: noise before every convolution, wider before the first."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn

from robusttrain.evaluation.voting import MeanPrediction, prediction
from robusttrain.noise.layer import noise_layers
from robusttrain.noise.rse import RSE
from toys.noise import Seen, images, network


class Deep(nn.Sequential):
    """Three convolutions that are the identity, with an identity layer before each, and a head."""

    def __init__(self) -> None:
        convolutions = [nn.Conv2d(1, 1, 1, bias=False) for _ in range(3)]
        for convolution in convolutions:
            nn.init.ones_(convolution.weight)
        parts = [part for convolution in convolutions for part in (Seen(), convolution)]
        super().__init__(*parts, Seen(), nn.Flatten(1), nn.Linear(2500, 2))


def levels(model: Deep) -> list[Tensor]:
    """The input of each convolution in the latest pass."""
    return [part.inputs[-1] for part in model if isinstance(part, Seen)]


@pytest.mark.parametrize("train", [False, True])
def test_the_noise_before_each_convolution_has_its_deviation(train: bool) -> None:
    model, x = Deep().train(train), torch.rand(10, 1, 50, 50)
    RSE(0.4, 0.15).install(model, 3)
    assert len(noise_layers(model)) == 3
    model(x)
    seen = levels(model)
    noises = [(after - before).flatten() for before, after in pairwise(seen)]
    for noise, sigma in zip(noises, (0.4, 0.15, 0.15), strict=True):
        assert kstest(noise.numpy(), "norm", (0, sigma)).pvalue > 1e-4
    assert np.abs(np.corrcoef(torch.stack(noises)) - np.eye(3)).max() < 0.03


def test_other_layers_get_no_noise() -> None:
    model, plain, x = network().eval(), network().eval(), images()
    RSE(initial=0.0, inner=0.0).install(model, 0)
    assert len(noise_layers(model)) == 2
    assert torch.equal(model(x), plain(x))


def test_the_prediction_averages_the_softmax_of_its_draws() -> None:
    model = network().eval()
    RSE().install(model, 0)
    rule = prediction(model, 50)
    assert isinstance(rule, MeanPrediction)
    assert rule.draws == 50


def test_the_deviations_of_the_paper_are_the_defaults() -> None:
    assert (RSE().initial, RSE().inner) == (0.2, 0.1)
