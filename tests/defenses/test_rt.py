"""RT against its formula: L + eps |grad_x L|_dual, and the parameter gradient of that."""

from collections.abc import Callable
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from robusttrain.attacks import cross_entropy
from robusttrain.defenses.rt import RT
from robusttrain.threat import Norm
from toys.defenses import asked

CLASSES, SHAPE, EPS = 3, (1, 2, 3), 0.3
PIXELS = 6

Array = NDArray[np.float64]
DUAL: dict[Norm, Callable[[Array], Array]] = {
    Norm.linf: lambda g: np.abs(g).sum(1),
    Norm.l2: lambda g: np.sqrt((g**2).sum(1)),
    Norm.l1: lambda g: np.abs(g).max(1),
}

every_norm = pytest.mark.parametrize("norm", list(Norm))


def batch(count: int = 5) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    x = torch.rand(count, *SHAPE, generator=draws, dtype=torch.float64)
    return x, torch.arange(count) % CLASSES


def regression() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(1), nn.Linear(PIXELS, CLASSES)).double()


def smooth() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Flatten(1), nn.Linear(PIXELS, 4), nn.Tanh(), nn.Linear(4, CLASSES)
    ).double()


def rt_loss(model: nn.Module, norm: Norm, x: Tensor, y: Tensor) -> Tensor:
    return asked(RT(norm, EPS), model, x, y).loss


def by_hand(weight: Array, bias: Array, norm: Norm) -> float:
    """The formula for softmax regression, whose input gradient is (p - onehot) W."""
    x, y = (part.numpy() for part in batch())
    logits = x.reshape(len(x), -1) @ weight.T + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    losses = -np.log(p[np.arange(len(y)), y])
    gradient = (p - np.eye(CLASSES)[y]) @ weight
    return float((losses + EPS * DUAL[norm](gradient)).mean())


def parts(model: nn.Module) -> tuple[Array, Array]:
    layer = cast(nn.Linear, cast(nn.Sequential, model)[1])
    return layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()


def parameter_gradient(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@every_norm
def test_the_loss_is_the_formula(norm: Norm) -> None:
    model = regression()
    loss = rt_loss(model, norm, *batch())
    assert loss.item() == pytest.approx(by_hand(*parts(model), norm), rel=1e-12)


@every_norm
def test_the_gradient_is_that_of_the_formula(norm: Norm) -> None:
    model = regression()
    gradient = parameter_gradient(model, rt_loss(model, norm, *batch())).numpy()
    flat = np.concatenate([part.ravel() for part in parts(model)])
    cut, step = CLASSES * PIXELS, 1e-6

    def value(theta: Array) -> float:
        return by_hand(theta[:cut].reshape(CLASSES, PIXELS), theta[cut:], norm)

    differences = [
        (value(flat + step * unit) - value(flat - step * unit)) / (2 * step)
        for unit in np.eye(len(flat))
    ]
    np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-9)


@every_norm
def test_the_gradient_of_a_deep_network_is_right(norm: Norm) -> None:
    """Finite differences over every parameter: nothing is lost on the way through the input."""
    model, (x, y) = smooth(), batch()
    names = [name for name, _ in model.named_parameters()]

    def loss(*values: Tensor) -> Tensor:
        def network(point: Tensor) -> Tensor:
            return cast(
                Tensor, functional_call(model, dict(zip(names, values, strict=True)), point)
            )

        return rt_loss(cast(nn.Module, network), norm, x, y)

    values = tuple(p.detach().clone().requires_grad_() for p in model.parameters())
    assert torch.autograd.gradcheck(loss, values)


@every_norm
def test_the_penalty_reaches_the_parameters(norm: Norm) -> None:
    """Without a graph through the input gradient, RT would silently be standard training."""
    model, (x, y) = smooth(), batch()
    full = parameter_gradient(model, rt_loss(model, norm, x, y))
    standard = parameter_gradient(model, cross_entropy(model(x), y).mean())
    assert (full - standard).norm() > 0.05 * standard.norm()
    # The last bias changes the input gradient only through the softmax, the subtlest path.
    assert not torch.allclose(full[-CLASSES:], standard[-CLASSES:], rtol=1e-3)


@every_norm
def test_a_network_without_slope_costs_nothing_and_stays_finite(norm: Norm) -> None:
    model, (x, y) = regression(), batch()
    for parameter in model.parameters():
        parameter.detach().zero_()
    loss = rt_loss(model, norm, x, y)
    assert loss.item() == pytest.approx(np.log(CLASSES), rel=1e-9)
    assert parameter_gradient(model, loss).isfinite().all()


def test_the_images_are_left_without_gradients() -> None:
    x, y = batch()
    rt_loss(smooth(), Norm.linf, x, y).backward()  # type: ignore[no-untyped-call]
    assert not x.requires_grad
    assert x.grad is None
