"""Dropout in training and prediction: which activations it zeroes, and how many."""

import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from robusttrain.noise.dropout import Dropout
from robusttrain.noise.layer import noise_layers
from toys.noise import Seen, images, network


def chain() -> nn.Sequential:
    """Two linear layers that are the identity."""
    first, second = (nn.Linear(400, 400, bias=False) for _ in range(2))
    for layer in (first, second):
        nn.init.eye_(layer.weight)
    return nn.Sequential(first, Seen(), second)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("train", [False, True])
def test_a_share_p_is_zeroed_and_the_rest_scaled(p: float, train: bool) -> None:
    model, x = chain().train(train), torch.rand(200, 400) + 1
    Dropout(p).install(model, 3)
    output = model(x)
    # Nothing happens before the first layer.
    assert torch.equal(model[1].inputs[0], x)
    zero = output == 0
    torch.testing.assert_close(output[~zero], x[~zero] / (1 - p))
    assert binomtest(int(zero.sum()), zero.numel(), p).pvalue > 1e-4


def test_entries_images_and_passes_are_dropped_independently() -> None:
    model, x = chain(), torch.ones(2, 400)
    Dropout(0.5).install(model, 3)
    kept = torch.cat([model(x) for _ in range(20)])
    correlation = torch.corrcoef(kept) - torch.eye(40)
    # The 780 entries off the diagonal are N(0, 1 / 400).
    assert correlation.abs().max() < 0.25
    assert torch.corrcoef(kept.T).fill_diagonal_(0).nan_to_num().mean().abs() < 0.01


def test_it_comes_before_every_layer_with_weights_but_the_first() -> None:
    model, x = network().eval(), images()
    Dropout(0.5).install(model, 3)
    assert len(noise_layers(model)) == 2
    shares: dict[int, float] = {}
    for place in (0, 3, 5):
        model[place].register_forward_pre_hook(
            lambda module, inputs, place=place: shares.update(
                {place: float((inputs[0] == 0).float().mean())}
            )
        )
    model(x)
    assert shares[0] == 0
    assert shares[3] == pytest.approx(0.5, abs=0.1)
    assert shares[5] == pytest.approx(0.5, abs=0.2)


def test_p_of_0_changes_nothing() -> None:
    model, plain, x = network().eval(), network().eval(), images()
    Dropout(0.0).install(model, 3)
    assert torch.equal(model(x), plain(x))


def test_the_gradient_passes_through_the_kept_activations() -> None:
    model, x = chain(), torch.rand(3, 400).requires_grad_()
    Dropout(0.25).install(model, 3)
    output = model(x)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(gradient, (output != 0) / 0.75)
