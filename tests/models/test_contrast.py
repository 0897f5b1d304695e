"""The contrast layer: its values, its unmasked gradient, and the pixels that attacks can use."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.pgd import PGD
from robusttrain.bounds.intervals import Interval
from robusttrain.errors import InputError
from robusttrain.models.contrast import Contrast
from robusttrain.models.conv_net import ConvNet


def test_values_are_those_of_a_clipped_line() -> None:
    x = torch.tensor([0.0, 0.25, 0.3, 0.5, 0.6, 0.75, 1.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.0, 0.1, 0.5, 0.7, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(Contrast(2)(x), expected)
    assert torch.equal(Contrast(1)(x), x)


def test_gradients_pass_where_the_result_is_flat_and_can_be_repeated() -> None:
    x = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], requires_grad=True)
    (slope,) = torch.autograd.grad(Contrast(4)(x).sum(), x)
    assert slope.tolist() == [4.0] * 5
    (first,) = torch.autograd.grad(Contrast(4)(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.tolist() == [32.0] * 5


@given(st.floats(1, 10), st.floats(0, 0.5))
def test_pixels_that_cannot_cross_do_not_change(contrast: float, eps: float) -> None:
    reach = 0.5 - 0.5 / contrast - eps
    x = torch.tensor([0.0, max(0.0, reach - 1e-6), 1.0, min(1.0, 1 - reach + 1e-6)])
    if reach > 1e-6:
        for shift in (-eps, eps):
            moved = (x + shift).clamp(0, 1)
            assert torch.equal(Contrast(contrast)(moved), Contrast(contrast)(x))


def test_attacks_see_past_the_flat_ends() -> None:
    """An attack can make a dark pixel bright, although the clip has gradient 0 at and near it."""
    bright = nn.Linear(1, 2)
    with torch.no_grad():
        bright.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        bright.bias.copy_(torch.tensor([0.5, -0.5]))
    model = nn.Sequential(Contrast(10), nn.Flatten(1), bright)
    x, y = torch.full((1, 1, 1, 1), 0.1), torch.tensor([0])
    for attack in (FGSM(eps=0.5), PGD(eps=0.5, steps=3, random_start=False)):
        assert int(model(attack(model, x, y)).argmax()) == 1


def test_bounds_are_those_of_the_values() -> None:
    ends = Contrast(2.5)(Interval.around(torch.tensor([0.0, 0.4, 1.0]), 0.3))
    torch.testing.assert_close(ends.lower, torch.tensor([0.0, 0.0, 1.0]))
    torch.testing.assert_close(ends.upper, torch.tensor([0.0, 1.0, 1.0]))


def test_a_network_has_the_layer_if_contrast_is_above_1() -> None:
    kinds = [type(layer) for layer in ConvNet(contrast=2.5).build(10, (1, 28, 28))]
    assert kinds[0] is Contrast
    assert kinds[1:] == [type(layer) for layer in ConvNet().build(10, (1, 28, 28))]


@pytest.mark.parametrize("contrast", [0.5, 0.0, -1.0, float("nan")])
def test_contrast_is_not_less_than_that_of_the_image(contrast: float) -> None:
    with pytest.raises(InputError, match=r"^contrast=.* is not allowed: it must be"):
        ConvNet(contrast=contrast)
