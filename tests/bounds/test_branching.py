"""Branch and bound: what it decides, what it finds, and why it may stop undecided."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from robusttrain.bounds import branching
from robusttrain.bounds.branching import Decision, Reason, Status, decide
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball
from toys.small_networks import CLASSES, SHAPE, built, image, plain


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return x + self.outer(F.relu(self.inner(F.relu(x))))


KINDS: dict[str, Callable[[], tuple[nn.Module, ...]]] = {
    "leaky": lambda: (nn.AvgPool2d(2), nn.Flatten(1), nn.Linear(4, 6), nn.LeakyReLU(0.1)),
    "clamps": lambda: (nn.AvgPool2d(2), nn.Flatten(1), nn.Linear(4, 6), nn.Hardtanh()),
    "max pool": lambda: (nn.MaxPool2d(2), nn.Flatten(1), nn.Linear(4, 6), nn.ReLU()),
    "residual": lambda: (
        nn.AvgPool2d(2), nn.Flatten(1), nn.Linear(4, 4), _Residual(), nn.Linear(4, 6),
    ),
}  # fmt: skip


def decided(
    model: nn.Module, x: Tensor, y: Tensor, threat: Threat, seconds: float = 60
) -> Decision:
    return decide(model, x, y, threat, seconds=seconds, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_networks_with_all_kinds_of_kinks_are_decided(name: str, seed: int) -> None:
    """A proof up to some radius, a counterexample from there on, and nothing in between."""
    model = built(*KINDS[name](), nn.Linear(6, CLASSES), seed=seed)
    x, y = image(model, seed)
    eps = [0.0, 0.05, 0.15, 0.4]
    found = [decided(model, x, y, Threat(Norm.linf, each)).status for each in eps]
    assert Status.undecided not in found
    assert found == sorted(found, reverse=True)
    assert found[0] == Status.proven


@pytest.mark.parametrize("norm", list(Norm))
def test_a_counterexample_is_in_the_ball_and_misclassified(norm: Norm) -> None:
    model = plain(0).float()
    x, y = (part for part in image(plain(0), 0))
    threat = Threat(norm, {Norm.linf: 0.5, Norm.l2: 1.5, Norm.l1: 4.0}[norm])
    decision = decided(model, x.float(), y, threat)
    assert decision.status == Status.counterexample
    point = decision.point
    assert point is not None
    assert point.dtype == torch.float32
    assert float(ball(threat).norm((point - x.float()).double())) <= threat.eps * (1 + 1e-5)
    assert point.min() >= 0
    assert point.max() <= 1
    assert int(model(point).argmax(1)) != int(y)


def hard() -> tuple[nn.Module, Tensor, Tensor, Threat]:
    """A question that takes several regions."""
    model = plain(9)
    return model, *image(model, 9), Threat(Norm.linf, 0.15)


def test_without_attacks_the_program_of_a_leaf_finds_the_counterexample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(branching, "ATTACK_STEPS", 0)
    model = plain(3)
    x, y = image(model, 3)
    for eps in (0.05, 0.08):
        assert decided(model, x, y, Threat(Norm.linf, eps)).status == Status.counterexample


def test_a_limit_of_time_leaves_the_image_undecided() -> None:
    model, x, y, threat = hard()
    decision = decided(model, x, y, threat, seconds=1e-9)
    assert (decision.status, decision.reason) == (Status.undecided, Reason.time)
    assert decision.point is None
    assert decision.bound <= 0
    assert decided(model, x, y, threat).status != Status.undecided


def test_a_limit_of_memory_leaves_the_image_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    search = branching._Search
    roots = search._roots

    def rooted(self: Any) -> Any:
        regions = roots(self)
        self.stored = math.inf
        return regions

    monkeypatch.setattr(search, "_roots", rooted)
    decision = decided(*hard())
    assert (decision.status, decision.reason) == (Status.undecided, Reason.memory)


def test_no_room_for_one_region_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branching, "budget", lambda device: 10)
    with pytest.raises(MemoryError, match=r"one region take .* bytes"):
        decided(*hard())


def test_smooth_activations_are_bounded_and_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(nn.Flatten(1), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, CLASSES), seed=3)
    x, y = image(model, 3)
    found = [decided(model, x, y, Threat(Norm.linf, eps)) for eps in (0.001, 0.3)]
    assert [each.status for each in found] == [Status.proven, Status.counterexample]
    monkeypatch.setattr(branching._Search, "_broken", lambda self, points: False)
    decision = decided(model, x, y, Threat(Norm.linf, 0.3))
    assert (decision.status, decision.reason) == (Status.undecided, Reason.incomplete)


def test_no_logits_at_all_are_a_counterexample() -> None:
    class Fails(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.flatten(1)[:, :CLASSES] * torch.nan

    x = torch.rand(1, *SHAPE)
    decision = decided(Fails(), x, torch.tensor([0]), Threat(Norm.linf, 0.1))
    assert decision.status == Status.counterexample
    assert decision.point is not None
    assert bool(decision.point.isfinite().all())


def test_a_decision_is_the_same_again_and_leaves_the_model_as_it_was() -> None:
    model, x, y, threat = hard()
    model.train()
    state = torch.get_rng_state()
    one, two = decided(model, x, y, threat), decided(model, x, y, threat)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert (one.status, one.regions) == (two.status, two.regions)
    assert one.bound == two.bound or math.isnan(one.bound)
