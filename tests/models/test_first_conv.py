"""The first convolution equals torch's, with another computation of the image gradient."""

import pytest
import torch
from torch import nn

from robusttrain.models import build_model
from robusttrain.models.first_conv import FirstConv2d
from robusttrain.models.small_cnn import SmallCNN

SHAPES = [(1, 3, 4, 2, 1), (3, 2, 3, 1, 1), (1, 2, 5, 1, 2), (2, 3, 3, 2, 0)]


def pair(shape: tuple[int, ...], *, bias: bool = True) -> tuple[nn.Conv2d, nn.Conv2d]:
    """torch's convolution and ours, with the same weights, in float64."""
    channels, out, kernel, stride, padding = shape
    plain = nn.Conv2d(channels, out, kernel, stride, padding, bias=bias).double()
    ours = FirstConv2d(channels, out, kernel, stride, padding, bias=bias).double()
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_those_of_torch(shape: tuple[int, ...], bias: bool) -> None:
    x = torch.rand(4, shape[0], 9, 11, dtype=torch.float64)
    results = []
    for layer in pair(shape, bias=bias):
        point = x.clone().requires_grad_()
        output = layer(point)
        loss = (output**3).sum()
        results.append([output, *torch.autograd.grad(loss, [point, *layer.parameters()])])
    for plain, ours in zip(*results, strict=True):
        assert torch.allclose(plain, ours, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_gradients_of_gradients_are_right(shape: tuple[int, ...]) -> None:
    """RT differentiates through the gradient of the image."""
    layer = pair(shape)[1]

    def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        keys = {"weight": weight, "bias": bias}
        result: torch.Tensor = torch.func.functional_call(layer, keys, x).tanh()
        return result

    x = torch.rand(2, shape[0], 6, 6, dtype=torch.float64, requires_grad=True)
    arguments = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_bf16_autocast_gives_gradients_of_the_images_type() -> None:
    plain, ours = (layer.float() for layer in pair(SHAPES[0]))
    slopes = []
    for layer in (plain, ours):
        x = torch.linspace(0, 1, 64).view(1, 1, 8, 8).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(x).sum()
        output.backward()
        assert x.grad is not None
        slopes.append(x.grad)
    assert slopes[1].dtype == torch.float32
    assert torch.allclose(*slopes, rtol=0.05, atol=0.05)


def test_a_network_goes_through_it_only_where_images_have_gradients() -> None:
    network = build_model(SmallCNN(), 10, (1, 28, 28))
    x = torch.rand(2, 1, 28, 28)
    assert "_Convolution" not in _names(network(x))
    assert "_Convolution" in _names(network(x.requires_grad_()))


def _names(output: torch.Tensor) -> str:
    names, nodes = [], [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None:
            names.append(node.name())
            nodes += [parent for parent, _ in node.next_functions]
    return " ".join(names)
