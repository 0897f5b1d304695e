"""Linear bounds: exact where the network is affine, never violated, never worse than intervals."""

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from scipy.optimize import minimize
from torch import Tensor, nn

from robusttrain.bounds import linear, relaxations
from robusttrain.bounds.graph import Affine, Graph
from robusttrain.bounds.inputs import InputSet
from robusttrain.bounds.intervals import Interval
from robusttrain.bounds.linear import margins
from robusttrain.bounds.relaxations import Lines
from robusttrain.errors import InputError
from robusttrain.models import Architecture
from robusttrain.models.conv_net import ConvNet
from robusttrain.models.madry_cnn import MadryCNN
from robusttrain.models.mlp import MLP
from robusttrain.models.preact_resnet import PreActResNet
from robusttrain.models.small_cnn import SmallCNN
from robusttrain.models.torchvision import TorchvisionModel
from robusttrain.models.wide_resnet import WideResNet
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball
from toys.small_networks import CLASSES, SHAPE, built
from toys.tries import tries

NORMS = list(Norm)
RADII = {Norm.linf: 0.1, Norm.l2: 0.4, Norm.l1: 1.0}
POINTS = tries(300, 10_000)


def images(count: int = 3, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    """Images in float64, and labels."""
    draws = torch.Generator().manual_seed(1)
    x = torch.rand(count, *shape, generator=draws, dtype=torch.float64)
    return x, torch.arange(count) % CLASSES


def true_margins(model: nn.Module, z: Tensor, y: Tensor) -> Tensor:
    """f_y - f_k, and inf for k = y."""
    logits = model(z)
    apart = logits.gather(1, y[:, None]) - logits
    return apart.scatter(1, y[:, None], torch.inf)


def searched(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, points: int) -> Tensor:
    """The least margins (N, K) at random points of S(x), and where gradients lead from them."""
    area, draws = ball(threat), torch.Generator().manual_seed(2)
    least = true_margins(model, x, y).detach()
    many = x.repeat_interleave(points, 0)
    labels = y.repeat_interleave(points)
    z = area.random_start(many, draws)
    targets = torch.arange(len(z)) % CLASSES
    for _ in range(4):
        z = z.detach().requires_grad_()
        found = true_margins(model, z, labels)
        least = torch.minimum(least, found.detach().view(len(x), points, -1).amin(1))
        towards = found.nan_to_num(0, 0, 0).gather(1, targets[:, None]).sum()
        (gradient,) = torch.autograd.grad(towards, z)
        z = area.project(z - threat.eps * area.steepest(gradient), many)
    return least


def sound(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, points: int = POINTS) -> bool:
    """Whether no margin at many points is below its bound, for all forms of the bounds."""
    least = searched(model, x, y, threat, points)
    forms: list[dict[str, Any]] = [{"refine": False}, {}, {"optimise": 3}]
    return all(bool((margins(model, x, y, threat, **form) <= least).all()) for form in forms)


class _Does(nn.Module):
    def __init__(self, what: Callable[[Any], Any]) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Any) -> Any:
        return self.what(x)


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Any) -> Any:
        kept = x
        h = F.relu(x)
        return torch.cat([kept + self.inner(h), 0.5 - h / 2, -(x * 1.5) - kept], 1)


# A layer of each kind between a convolution and an affine layer, with its number of outputs.
LAYERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "relu": (nn.ReLU, 18),
    "relu in place": (lambda: nn.ReLU(inplace=True), 18),
    "leaky": (lambda: nn.LeakyReLU(0.2), 18),
    "relu6": (nn.ReLU6, 18),
    "hardtanh": (nn.Hardtanh, 18),
    "hardsigmoid": (nn.Hardsigmoid, 18),
    "clamps": (lambda: _Does(lambda x: x.clamp_min(-0.5).clamp_max(0.7).clamp(min=0)), 18),
    "tanh": (nn.Tanh, 18),
    "sigmoid": (nn.Sigmoid, 18),
    "softplus": (nn.Softplus, 18),
    "logsigmoid": (nn.LogSigmoid, 18),
    "softsign": (nn.Softsign, 18),
    "elu": (nn.ELU, 18),
    "steep elu": (lambda: nn.ELU(3.0), 18),
    "celu": (nn.CELU, 18),
    "selu": (nn.SELU, 18),
    "batch norm": (lambda: nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()), 18),
    "max pool": (lambda: nn.MaxPool2d(2, 1), 8),
    "padded max pool": (lambda: nn.MaxPool2d(3, 2, padding=1), 8),
    "adaptive max pool": (lambda: nn.AdaptiveMaxPool2d(2), 8),
    "average pool": (lambda: nn.Sequential(nn.ReLU(), nn.AvgPool2d(2, 1)), 8),
    "adaptive average pool": (lambda: nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1)), 2),
    "residual": (lambda: nn.Sequential(_Residual(), nn.ReLU()), 54),
    "dropout": (lambda: nn.Sequential(nn.ReLU(), nn.Dropout(), nn.Dropout2d()), 18),
    "moved": (
        lambda: _Does(lambda x: x.permute(0, 2, 3, 1).relu()[:, :, 1:].reshape(len(x), 12)), 12,
    ),
    "means": (lambda: _Does(lambda x: x.relu().mean((2, 3)) - torch.sum(x, dim=(2, 3))), 2),
    "in place": (
        lambda: _Does(lambda x: (x * 1).sub_(0.5).mul_(-2.0).relu() + x.clone().add_(x)), 18,
    ),
}  # fmt: skip


def layered(name: str, seed: int = 0) -> nn.Sequential:
    make, out = LAYERS[name]
    first = nn.Conv2d(1, 2, 2)
    return built(first, make(), nn.Flatten(1), nn.Linear(out, CLASSES), seed=seed)


@pytest.mark.parametrize("name", LAYERS)
def test_no_point_has_a_margin_below_its_bound(name: str) -> None:
    model = layered(name)
    x, y = images()
    for norm in NORMS:
        assert sound(model, x, y, Threat(norm, RADII[norm]))


@pytest.mark.parametrize("name", LAYERS)
def test_at_radius_0_bounds_are_the_margins(name: str) -> None:
    model = layered(name)
    x, y = images()
    for norm in NORMS:
        bounds = margins(model, x, y, Threat(norm, 0.0))
        torch.testing.assert_close(bounds, true_margins(model, x, y), atol=1e-8, rtol=0)


# --- unsound rules are caught --------------------------------------------------------------------

MIXED = ("residual", "leaky", "batch norm")


def affine_nodes(name: str) -> int:
    model = layered(name)
    return sum(
        isinstance(node, Affine) for node in Graph(model, Interval.around(images()[0], 0.1)).nodes
    )


@pytest.mark.parametrize(
    ("name", "at"),
    [
        (name, at)
        for name in ("residual", "leaky", "batch norm")
        for at in range(affine_nodes(name))
    ],
)
def test_a_flipped_sign_in_one_operation_is_caught(
    name: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = layered(name)
    pull = Affine.pull
    x, y = images(6)
    count = affine_nodes(name)
    order: list[Affine] = []
    initialise = Affine.__init__

    def remembered(self: Affine, *given: Any) -> None:
        initialise(self, *given)
        order.append(self)

    def flipped(self: Affine, coefficients: Tensor) -> tuple[Tensor, ...]:
        parts = pull(self, coefficients)
        wrong = self in order and order.index(self) % count == at
        return tuple(-part for part in parts) if wrong else parts

    monkeypatch.setattr(Affine, "__init__", remembered)
    monkeypatch.setattr(Affine, "pull", flipped)
    assert not sound(model, x, y, Threat(Norm.linf, 0.1), 50)


WRONG: dict[str, Callable[[Lines], Lines]] = {
    "swapped": lambda lines: Lines(*lines[2:], *lines[:2]),
    "raised below": lambda lines: lines._replace(lower_intercept=lines.lower_intercept + 1),
    "lowered above": lambda lines: lines._replace(upper_intercept=lines.upper_intercept - 1),
}
# The line below ReLU goes through 0; its intercept is not read.
PLANTED = [
    (kind, wrong)
    for kind in ("relu", "softplus", "tanh", "elu")
    for wrong in WRONG
    if (kind, wrong) != ("relu", "raised below")
]


@pytest.mark.parametrize(("kind", "wrong"), PLANTED)
def test_a_wrong_line_at_an_activation_is_caught(
    kind: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place: Any = linear if kind == "relu" else relaxations.Shape
    name = "relu_lines" if kind == "relu" else "lines"
    right = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *given: WRONG[wrong](right(*given)))
    assert not sound(layered(kind), *images(6), Threat(Norm.linf, 0.1), 50)


@pytest.mark.parametrize("norm", NORMS)
def test_a_wrong_minimum_over_the_ball_is_caught(
    norm: Norm, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = InputSet.minimum
    monkeypatch.setattr(InputSet, "minimum", lambda self, a: -right(self, -a))
    assert not sound(layered("relu"), *images(6), Threat(norm, RADII[norm]), 50)


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [0.05, 0.5, 3.0])
def test_the_least_value_of_a_linear_function_is_that_of_an_optimiser(
    norm: Norm, eps: float
) -> None:
    if norm == Norm.linf and eps > 1:
        return
    draws = torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, 2, 3, generator=draws, dtype=torch.float64)
    a = torch.randn(3, 2, 1, 2, 3, generator=draws, dtype=torch.float64)
    inputs = InputSet(x, Threat(norm, eps))
    found, points = inputs.minimum(a), inputs.minimiser(a)
    reached = (a * points).flatten(2).sum(2)
    torch.testing.assert_close(found, reached, atol=1e-5, rtol=1e-5)
    assert bool((found <= reached + 1e-12).all())
    order = {Norm.linf: torch.inf, Norm.l2: 2, Norm.l1: 1}[norm]
    lengths = torch.linalg.vector_norm((points - x).flatten(2), ord=order, dim=2)
    assert bool((lengths <= eps * (1 + 1e-9)).all())
    assert points.min() >= -1e-12
    assert points.max() <= 1 + 1e-12
    if norm == Norm.l2:
        for s in range(3):
            for n in range(2):
                assert abs(_by_slsqp(a[s, n], x[n], eps) - float(found[s, n])) < 1e-5


def _by_slsqp(a: Tensor, x: Tensor, eps: float) -> float:
    slope, start = a.flatten().numpy(), x.flatten().numpy()
    inside: dict[str, Any] = {"type": "ineq", "fun": lambda z: eps**2 - ((z - start) ** 2).sum()}
    done: Any = minimize(
        lambda z: slope @ z, start, jac=lambda z: slope, method="SLSQP", constraints=[inside],
        bounds=[(0, 1)] * len(start), options={"ftol": 1e-12, "maxiter": 500},
    )  # fmt: skip
    return float(done.fun)


@pytest.mark.parametrize("norm", NORMS)
def test_bounds_of_a_linear_model_are_reached(norm: Norm) -> None:
    """min of <w_y - w_k, z> over the ball inside the box is w x - eps |w|_dual."""
    model = built(nn.Flatten(1), nn.Linear(16, CLASSES), seed=0)
    x, y = images()
    x = 0.4 + 0.2 * x
    threat = Threat(norm, 0.1)
    bounds = margins(model, x, y, threat)
    w = model[1].weight
    for k in range(CLASSES):
        way = ball(threat).dual_norm((w[y] - w[k]).detach())
        expected = true_margins(model, x, y)[:, k] - 0.1 * way
        torch.testing.assert_close(bounds[:, k], expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["relu", "residual", "max pool", "hardtanh"])
def test_where_no_activation_has_two_signs_bounds_are_those_of_the_gradient(
    name: str, norm: Norm
) -> None:
    model = layered(name)
    x, y = images()
    threat = Threat(norm, 1e-6)
    z = x.clone().requires_grad_()
    at_x = true_margins(model, z, y)
    bounds = margins(model, x, y, threat)
    for k in range(CLASSES):
        (gradient,) = torch.autograd.grad(
            at_x[:, k].nan_to_num(0, 0, 0).sum(), z, retain_graph=True
        )
        expected = at_x[:, k].detach() - 1e-6 * ball(threat).dual_norm(gradient)
        torch.testing.assert_close(bounds[:, k], expected, atol=1e-11, rtol=1e-12)


# --- networks of the project ----------------------------------------------------------------------

ARCHITECTURES: list[Architecture] = [
    MLP(widths=[20, 20]), SmallCNN(width=2), ConvNet([4], [2], [20], contrast=2),
    MadryCNN([2, 4], 16), PreActResNet(blocks=[1, 1], width=2),
    WideResNet(depth=10, width=1, dropout=0.5),
]  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: type(each).__name__)
def test_networks_of_the_project_have_bounds_that_are_better_than_intervals(
    architecture: Architecture,
) -> None:
    torch.manual_seed(0)
    model = architecture.build(CLASSES, (1, 8, 8)).double().eval()
    x, _ = images(2, (1, 8, 8))
    y = model(x).argmax(1)
    outputs = cast(Interval, model(Interval.around(x, 0.02)))
    by_intervals = -outputs.margins(y).detach().scatter(1, y[:, None], -torch.inf)
    threat = Threat(Norm.linf, 0.02)
    rough = margins(model, x, y, threat, refine=False)
    others = by_intervals.isfinite()
    assert bool((rough - by_intervals >= -1e-9)[others].all())
    deep = isinstance(architecture, WideResNet)
    bounds = rough if deep else margins(model, x, y, threat)
    assert bool((bounds - rough >= -1e-6 * (1 + rough.abs()))[others].all())
    assert bool((bounds <= searched(model, x, y, threat, 20)).all())
    if not deep:
        gap = true_margins(model, x, y) - by_intervals
        closer = true_margins(model, x, y) - bounds
        assert closer[others].mean() < 0.95 * gap[others].mean()


def test_resnets_of_torchvision_have_bounds() -> None:
    torch.manual_seed(0)
    model = TorchvisionModel(name="resnet18").build(4, (3, 32, 32)).eval()
    x = torch.rand(1, 3, 32, 32)
    y = model(x).argmax(1)
    bounds = margins(model, x, y, Threat(Norm.linf, 1e-4), refine=False)
    assert bool((bounds <= true_margins(model, x, y)).all())
    assert bounds.isfinite().sum() == 3


# --- refusals, memory, rounding -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (lambda x: x.softmax(1), "softmax"),
        (lambda x: F.gelu(x), "gelu"),
        (lambda x: x * x, "mul"),
        (lambda x: x - x.mean(0), "a change of the number of images"),
        (lambda x: x.sum(0), "a change of the number of images"),
        (lambda x: torch.cat([x, x]), "a change of the number of images"),
        (lambda x: x.flip(0), "flip"),
        (lambda x: F.leaky_relu(x, -0.5), "leaky_relu with a negative parameter"),
        (lambda x: F.dropout(x), "dropout"),
    ],
)
def test_what_has_no_bounds_is_refused_by_name(what: Callable[[Any], Any], reason: str) -> None:
    model = nn.Sequential(_Does(what), nn.Flatten(1), nn.Linear(16, CLASSES)).double()
    with pytest.raises(InputError, match=f"not through {reason}"):
        margins(model, *images(), Threat(Norm.linf, 0.1))


def test_an_output_that_depends_on_other_images_is_refused() -> None:
    model = _Does(lambda x: x.permute(2, 1, 0, 3).flatten(1))
    with pytest.raises(InputError, match="not through sums over images"):
        Graph(model, Interval.around(images(4)[0], 0.1))


def test_less_memory_means_smaller_passes_with_the_same_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = layered("residual")
    x, y = images(4)
    threat = Threat(Norm.linf, 0.1)
    whole = margins(model, x, y, threat, optimise=3)
    graph = Graph(model, Interval.around(x, 0.1))
    one = linear.bytes_of_pass(graph, 8, differentiable=True)
    least = 2 * max(one, linear.bytes_of_trace(graph, 8))
    monkeypatch.setattr(linear, "budget", lambda device: least)
    largest = [0]
    run = linear.Backward.__call__

    def measured(self: Any, node: Any, coefficients: Tensor) -> Any:
        largest[0] = max(largest[0], coefficients.shape[0] * coefficients.shape[1])
        return run(self, node, coefficients)

    monkeypatch.setattr(linear.Backward, "__call__", measured)
    torch.testing.assert_close(margins(model, x, y, threat, optimise=3), whole)
    assert largest[0] == max(1, least // 2 // one)
    monkeypatch.setattr(linear, "budget", lambda device: least - 2)
    with pytest.raises(MemoryError, match=r"take .* bytes"):
        margins(model, x, y, threat, optimise=3)


def test_close_calls_are_decided_in_float64() -> None:
    model = nn.Sequential(nn.Flatten(1), nn.Linear(16, 2))
    weight, bias = model[1].weight.data, model[1].bias.data
    weight.copy_(torch.stack([torch.ones(16), -torch.ones(16)]))
    x = torch.full((2, *SHAPE), 0.5)
    # f_0 - f_1 is 2 (sum of z) + b_0 - b_1, whose least value in the ball is 2 * 16 * 0.25 + ...
    for gap, proven in ((1e-5, True), (-1e-5, False)):
        bias.copy_(torch.tensor([0.0, 8.0 - gap]))
        bounds = margins(model, x, torch.tensor([0, 0]), Threat(Norm.linf, 0.25))
        assert bounds.dtype == torch.float32
        assert bool((bounds.amin(1) > 0).all()) == proven
    single, _ = linear._margins(
        model, x, torch.tensor([0, 0]), Threat(Norm.linf, 0.25), 0, math.inf
    )
    assert bool((single.amin(1).abs() < 1e-4).all())


def test_modes_parameters_and_random_streams_stay() -> None:
    model = nn.Sequential(nn.Flatten(1), nn.Dropout(), nn.Linear(16, CLASSES)).double().train()
    model[1].eval()
    state = torch.get_rng_state()
    margins(model, *images(), Threat(Norm.linf, 0.1), optimise=2)
    assert (model.training, model[1].training) == (True, False)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
