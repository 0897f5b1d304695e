"""Interval bounds: exact for affine models, never violated, and equal to another formulation."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import torchvision
import torchvision.transforms.v2
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from robusttrain.bounds.intervals import Interval, refuse_unbounded
from robusttrain.errors import InputError
from robusttrain.models import Architecture
from robusttrain.models.conv_net import ConvNet
from robusttrain.models.linear import Linear
from robusttrain.models.madry_cnn import MadryCNN
from robusttrain.models.mlp import MLP
from robusttrain.models.preact_resnet import PreActResNet
from robusttrain.models.small_cnn import SmallCNN
from robusttrain.models.torchvision import TorchvisionModel
from robusttrain.models.wide_resnet import WideResNet
from robusttrain.threat import Norm

Array = NDArray[np.float64]
CLASSES = 3


def images(count: int = 5, size: int = 4) -> tuple[Tensor, Tensor]:
    """Images in float64, and labels."""
    draws = torch.Generator().manual_seed(1)
    x = torch.rand(count, 1, size, size, generator=draws, dtype=torch.float64)
    return x, torch.arange(count) % CLASSES


def built(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    """The layers in float64 and eval mode, with weights of this seed."""
    draws = torch.Generator().manual_seed(seed)
    model = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws))
    return model


def contained(model: nn.Module, x: Tensor, eps: float) -> bool:
    """Whether outputs at 64 points around each image, half of them corners, are within bounds."""
    draws = torch.Generator().manual_seed(3)
    bounds = model(Interval.around(x, eps))
    slack = 1e-9 + 1e-6 * bounds.radius
    for attempt in range(64):
        shift = 2 * torch.rand(x.shape, generator=draws, dtype=x.dtype) - 1
        shift = shift.sign() if attempt % 2 else shift
        z = model((x + eps * shift).clamp(0, 1))
        if not bool(((z >= bounds.lower - slack) & (z <= bounds.upper + slack)).all()):
            return False
    return True


def ends(x: Array, eps: float) -> tuple[Array, Array]:
    return np.clip(x - eps, 0, 1), np.clip(x + eps, 0, 1)


def affine_ends(low: Array, high: Array, w: Array, b: Array) -> tuple[Array, Array]:
    """Bounds by the signs of the weights, instead of centres and radii."""
    rise, fall = np.maximum(w, 0), np.minimum(w, 0)
    return low @ rise.T + high @ fall.T + b, high @ rise.T + low @ fall.T + b


def test_a_two_layer_network_is_bounded_as_by_the_signs_of_its_weights() -> None:
    model = built(nn.Flatten(1), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, CLASSES))
    x, y = images()
    w1, b1, w2, b2 = (p.detach().numpy() for p in model.parameters())
    low, high = affine_ends(*ends(x.flatten(1).numpy(), 0.2), w1, b1)
    low, high = np.maximum(low, 0), np.maximum(high, 0)
    lower, upper = affine_ends(low, high, w2, b2)
    bounds = model(Interval.around(x, 0.2))
    np.testing.assert_allclose(bounds.lower.detach(), lower)
    np.testing.assert_allclose(bounds.upper.detach(), upper)
    for row, label in enumerate(y.tolist()):
        apart, shift = w2 - w2[label], b2 - b2[label]
        _, highest = affine_ends(low[row : row + 1], high[row : row + 1], apart, shift)
        np.testing.assert_allclose(bounds.margins(y)[row].detach(), highest[0], atol=1e-12)


def test_the_margins_of_a_linear_model_are_reached() -> None:
    """sup of (w_k - w_y) z over the ball, at the corner that the signs of w_k - w_y name."""
    model = built(nn.Flatten(1), nn.Linear(16, CLASSES))
    x, y = images()
    w = model[1].weight
    margins = model(Interval.around(x, 0.1)).margins(y)
    for k in range(CLASSES):
        corner = x + 0.1 * (w[k] - w[y]).sign().view_as(x)
        z = model(corner.clamp(0, 1))
        reached = z[:, k] - z.gather(1, y[:, None]).squeeze(1)
        torch.testing.assert_close(margins[:, k], reached)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(2, 3, 2, dilation=2, bias=False),
        nn.BatchNorm2d(2),
        nn.BatchNorm2d(2, affine=False),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Sequential(nn.Flatten(1), nn.Linear(32, 5)),
        nn.Sequential(nn.Flatten(1), nn.BatchNorm1d(32)),
    ],
    ids=str,
)
def test_the_radius_behind_an_affine_layer_is_its_matrix_in_absolute_values(
    layer: nn.Module,
) -> None:
    """It is |J| r, with J by automatic differentiation; a larger radius would not be tight."""
    draws = torch.Generator().manual_seed(0)
    layer = layer.double().eval()
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for values in (module.running_mean, module.running_var, *module.parameters()):
                assert values is not None
                values.data.copy_(torch.rand(values.shape, generator=draws) - 0.3)
            assert module.running_var is not None
            module.running_var.abs_()
    x, r = (torch.rand(1, 2, 4, 4, generator=draws, dtype=torch.float64) for _ in range(2))
    bounds = layer(Interval(x, r))
    matrix = torch.autograd.functional.jacobian(layer, x).flatten(-4).flatten(0, -2)
    torch.testing.assert_close(bounds.centre, layer(x))
    torch.testing.assert_close(bounds.radius.flatten(), matrix.abs() @ r.flatten())


@pytest.mark.parametrize(
    ("layers", "out"),
    [
        ((nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 2, stride=2)), 8),
        ((nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)), 8),
        ((nn.AvgPool2d(2), nn.Conv2d(1, 2, 3, padding=1), nn.Tanh()), 8),
        ((nn.Conv2d(1, 4, 3, bias=False), nn.LeakyReLU(), nn.AdaptiveAvgPool2d(1)), 4),
        ((nn.Conv2d(1, 2, 3, padding=1), nn.ELU(2.0), nn.AdaptiveMaxPool2d(2)), 8),
        ((nn.Sigmoid(), nn.Dropout(), nn.Dropout2d()), 16),
        ((nn.ReLU(inplace=True), nn.Hardtanh(inplace=True), nn.Softplus(), nn.SELU()), 16),
    ],
)
@given(seed=st.integers(0, 2**31), eps=st.floats(0, 0.5))
@settings(deadline=None, max_examples=15)
def test_no_output_leaves_its_bounds(
    layers: tuple[nn.Module, ...], out: int, seed: int, eps: float
) -> None:
    model = built(*layers, nn.Flatten(1), nn.Linear(out, CLASSES), seed=seed)
    assert contained(model, images()[0], eps)


class _Sums(nn.Module):
    """Arithmetic as in a user's own layers."""

    def forward(self, x: Any) -> Any:
        shift = torch.linspace(-1, 1, 4)
        return torch.cat([(0.5 - (x - shift) * -3.0 + x) / -shift.add(2) + (-x) * shift, x], 1)


@given(eps=st.floats(0, 0.5))
@settings(deadline=None, max_examples=15)
def test_sums_and_multiples_stay_within_their_bounds(eps: float) -> None:
    assert contained(nn.Sequential(_Sums(), nn.ReLU(), _Sums()), images()[0], eps)


ARCHITECTURES: list[Architecture] = [
    Linear(), MLP(), SmallCNN(), ConvNet(contrast=2), MadryCNN(), PreActResNet(width=4),
    WideResNet(depth=10, width=1, dropout=0.5), TorchvisionModel(name="resnet18"),
    TorchvisionModel(name="vgg11"), TorchvisionModel(name="mobilenet_v2"),
    TorchvisionModel(name="densenet121"),
]  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_the_networks_of_the_project_are_bounded(architecture: Architecture) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    model = architecture.build(4, (3, 32, 32)).double()
    model(x)
    assert contained(model.eval(), x, 1e-3)


def test_differences_of_outputs_are_tighter_than_outputs_apart() -> None:
    model = built(nn.Flatten(1), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, CLASSES))
    x, y = images()
    bounds = model(Interval.around(x, 0.2))
    apart = Interval(bounds.centre, bounds.radius).margins(y)
    assert bool((bounds.margins(y) <= apart + 1e-12).all())
    assert bool((bounds.margins(y) < apart - 1e-3).any())


def test_gradients_reach_the_weights() -> None:
    model = built(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(1), nn.Linear(8, CLASSES))
    x, y = images(2)
    names = [name for name, _ in model.named_parameters()]

    def margins(*values: Tensor) -> Tensor:
        weights = dict(zip(names, values, strict=True))
        bounds = torch.func.functional_call(model, weights, (Interval.around(x, 0.1),))
        return bounds.margins(y)

    check: Callable[..., bool] = torch.autograd.gradcheck
    assert check(margins, tuple(p.detach().clone().requires_grad_() for p in model.parameters()))


def test_the_ball_ends_at_the_box() -> None:
    ball = Interval.around(torch.tensor([0.0, 0.25, 0.5, 1.0]), 0.25)
    assert ball.lower.tolist() == [0.0, 0.0, 0.25, 0.75]
    assert ball.upper.tolist() == [0.25, 0.5, 0.75, 1.0]


class _InPlace(nn.Module):
    """A network that uses a tensor again after an activation has overwritten it."""

    def forward(self, x: Any) -> Any:
        h = x - 0.5
        kept = h
        return nn.functional.relu(h, inplace=True) + kept


def test_what_is_overwritten_in_place_is_bounded_as_it_is_then() -> None:
    assert contained(_InPlace(), images()[0], 0.1)
    affine = nn.Linear(4, 3)
    bounds = affine(Interval(torch.zeros(1, 4), torch.ones(1, 4)))
    nn.functional.relu(bounds, inplace=True)
    y = torch.tensor([1])
    apart = Interval(bounds.centre, bounds.radius).margins(y)
    assert torch.equal(bounds.margins(y), apart)


def test_what_is_added_may_be_larger() -> None:
    sum_of = Interval(torch.zeros(2, 1, 4), torch.ones(2, 1, 4)) + torch.zeros(1, 3, 1)
    assert sum_of.centre.shape == sum_of.radius.shape == (2, 3, 4)


# Layers as a user writes them: keywords, methods in place of functions, changes of shape, means.
WRITTEN: dict[str, Callable[[Any], Any]] = {
    "linear by keywords": lambda x: F.linear(input=x, weight=WEIGHT, bias=WEIGHT[:, 0]),
    "convolution by keywords": lambda x: F.conv2d(
        input=x, weight=WEIGHT.view(4, 1, 2, 2), bias=WEIGHT[:, 0], stride=2, padding=1
    ),
    "batch norm by keywords": lambda x: F.batch_norm(
        input=x, running_mean=WEIGHT[0, :1], running_var=WEIGHT[0, :1].abs(), bias=WEIGHT[1, :1]
    ),
    "sum by keywords": lambda x: torch.cat(tensors=(x, -x), dim=1),
    "activations by keywords": lambda x: F.leaky_relu(input=F.relu(input=x), negative_slope=0.1),
    "pool by keywords": lambda x: F.max_pool2d(
        input=F.avg_pool2d(input=x, kernel_size=2), kernel_size=1
    ),
    "view": lambda x: F.linear(x.view(x.size(0), -1, 4), WEIGHT),
    "view of a convolution": lambda x: F.conv2d(x, WEIGHT.view(4, 1, 2, 2)).view(len(x), 36),
    "reshape": lambda x: torch.reshape(x.reshape(x.shape[0], -1), (-1, 2, 8)),
    "mean": lambda x: x.mean((2, 3)) + x.mean(dim=-1, keepdim=True).mean(2),
    "mean by torch": lambda x: torch.mean(-x, dim=(1, 2)),
    "sum": lambda x: x.sum(1) - torch.sum(x, 1),
    "moved": lambda x: torch.transpose(x.permute(0, 2, 3, 1), 1, 2).contiguous()[:, 1:, ::2],
    "squeezed": lambda x: torch.unsqueeze(x.squeeze(1), -1),
    "methods": lambda x: (x - 0.5).tanh().clamp(-0.2, 0.3).sigmoid().clamp_min(0.5).relu(),
    "in place": lambda x: x.clone().sub_(0.5).mul_(-2.0).add_(x).div_(-0.3),
    "asked": lambda x: x - 0.5 if isinstance(x, Tensor) and x.dim() == x.ndim == 4 else None,
}  # fmt: skip
WEIGHT = torch.randn(4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize("name", WRITTEN)
def test_layers_as_users_write_them_are_bounded(name: str) -> None:
    x = images()[0]
    assert contained(_Does(WRITTEN[name]), x, 0.1)
    exact = WRITTEN[name](Interval.around(x, 0.0))
    torch.testing.assert_close(exact.centre, WRITTEN[name](x))
    assert exact.radius.abs().max() < 1e-12


@pytest.mark.parametrize("inplace", [False, True])
def test_a_normalisation_by_torchvision_is_bounded(inplace: bool) -> None:
    """It asks whether its input is a tensor of floats; bounds of its output are exact."""
    normalize = torchvision.transforms.Normalize([0.2], [-0.3], inplace)
    x = images()[0]
    bounds = normalize(Interval.around(x, 0.1))
    low, high = ends(x.numpy(), 0.1)
    np.testing.assert_allclose(bounds.lower, (high - 0.2) / -0.3)
    np.testing.assert_allclose(bounds.upper, (low - 0.2) / -0.3)


class _Does(nn.Module):
    def __init__(self, what: Callable[[Any], Any]) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Any) -> Any:
        return self.what(x)


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (nn.Softmax(1), "softmax"),
        (nn.GELU(), "gelu"),
        (nn.LayerNorm(4), "layer_norm"),
        (nn.LeakyReLU(-0.5), "leaky_relu with a negative parameter"),
        (nn.ELU(-1.0), "elu with a negative parameter"),
        (nn.BatchNorm2d(1), "statistics of a batch"),
        (nn.BatchNorm2d(1, track_running_stats=False).eval(), "statistics of a batch"),
        (nn.Dropout(), "dropout, which has to be in eval mode"),
        (_Does(lambda x: x.sort(1)), "sort"),
        (_Does(lambda x: x.to(torch.bfloat16)), "to"),
        (_Does(lambda x: F.linear(weight=x, input=torch.ones(2, 4))), "linear"),
        (_Does(lambda x: x if x > 0 else -x), "__gt__"),
        (_Does(lambda x: x == 0), "__eq__"),
        (_Does(lambda x: x**2), "__pow__"),
        (_Does(lambda x: 1 / x), "__rtruediv__"),
        (_Does(lambda x: list(x)), "__iter__"),
        (_Does(lambda x: torch.ones(4) + x), "add"),
        (_Does(lambda x: torch.cat([x, torch.zeros(5, 1, 4, 4)])), "cat"),
    ],
)
def test_what_has_no_bounds_is_refused_by_name(layer: nn.Module, what: str) -> None:
    with pytest.raises(InputError, match=f"and not through {what}"):
        layer(Interval.around(images()[0].float(), 0.1))


UNFIT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "softmax": (lambda: nn.Softmax(1), r"not through softmax$"),
    "v2": (lambda: torchvision.transforms.v2.Normalize([0.5], [0.1]), r"its outputs leave"),
    "type": (
        lambda: _Does(lambda x: x / 9 if type(x) is Tensor else x),
        r"its outputs leave their bounds",
    ),
    "numpy": (lambda: _Does(lambda x: torch.from_numpy(np.asarray(x))), r"."),
    "bug": (lambda: _Does(lambda x: x.nonsense), r"not through nonsense$"),
    "fails": (lambda: _Does(lambda x: {}["no"] if x.requires_grad is False else x), r"no"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_model_that_treats_bounds_otherwise_than_images_is_refused(name: str) -> None:
    """To skip its normalisation, as code does that knows tensors alone, would prove too much."""
    make, reason = UNFIT[name]
    model = nn.Sequential(make(), nn.Flatten(1), nn.Linear(16, CLASSES))
    refused = rf"^defense=ibp cannot be used with this model: .*{reason}"
    with pytest.raises(InputError, match=refused):
        refuse_unbounded(model, (1, 4, 4), Norm.linf, "defense=ibp")


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("scale", [1, 1000])
def test_the_networks_of_the_project_are_not_refused(
    architecture: Architecture, scale: float
) -> None:
    torch.manual_seed(0)
    model = architecture.build(4, (3, 32, 32))
    for parameter in list(model.parameters())[-2:]:
        parameter.data.mul_(scale)
    refuse_unbounded(model, (3, 32, 32), Norm.linf, "defense=ibp")
