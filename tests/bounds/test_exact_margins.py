"""Bounds of small networks against their exact least margins, and branch and bound against both."""

from itertools import pairwise
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from robusttrain.bounds.branching import Status, decide
from robusttrain.bounds.intervals import Interval
from robusttrain.bounds.linear import margins
from robusttrain.threat import Threat
from robusttrain.threat.balls import ball
from toys.exact_margins import affine_parts, least_margin
from toys.small_networks import CLASSES, SHAPE, image, plain
from toys.tries import tries

NETWORKS = tries(6, 100)
# Radii at which some of these networks are robust.
RADII = {"linf": (0.02, 0.08, 0.25), "l1": (0.1, 0.4, 1.5), "l2": (0.05, 0.2, 0.6)}
TOLERANCE = 1e-6


def truth(model: nn.Sequential, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """The least margins (1, K), with inf for k = y."""
    parts, label = affine_parts(model, SHAPE), int(y)
    return torch.tensor(
        [
            [
                torch.inf if k == label else least_margin(parts, x, label, k, threat)
                for k in range(CLASSES)
            ]
        ],
        dtype=torch.float64,
    )


def by_intervals(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    outputs = cast(Interval, model(Interval.around(x, eps)))
    return (-outputs.margins(y)).detach().scatter(1, y[:, None], torch.inf)


@pytest.mark.parametrize("norm", ["linf", "l1"])
@pytest.mark.parametrize("seed", range(NETWORKS))
def test_better_bounds_come_closer_to_the_truth_and_never_pass_it(norm: str, seed: int) -> None:
    model = plain(seed)
    x, y = image(model, seed)
    eps = RADII[norm][seed % 4 % 3]
    threat = Threat(norm, eps)
    exact = truth(model, x, y, threat)
    ladder = [
        by_intervals(model, x, y, eps),
        margins(model, x, y, threat),
        margins(model, x, y, threat, optimise=10),
        exact,
    ]
    for lower, higher in pairwise(ladder):
        assert bool((lower <= higher + TOLERANCE).all()), (lower, higher)
    decision = decide(model, x, y, threat, seconds=60, generator=torch.Generator())
    assert decision.status == (
        Status.proven if bool((exact > 0).all()) else Status.counterexample
    ), decision
    if decision.status == Status.proven:
        # It may be below `ladder[2]`: a region is left as soon as it is proven.
        assert 0 < decision.bound <= exact.min() + TOLERANCE


@pytest.mark.parametrize("seed", range(NETWORKS))
def test_in_l2_small_networks_are_decided_too(seed: int) -> None:
    """No exact truth, but a counterexample is one, and a proof withstands a long search."""
    model = plain(seed)
    x, y = image(model, seed)
    threat = Threat("l2", RADII["l2"][seed % 4 % 3])
    decision = decide(model, x, y, threat, seconds=60, generator=torch.Generator())
    assert decision.status != Status.undecided
    if decision.point is not None:
        assert ball(threat).norm(decision.point - x) <= threat.eps * (1 + 1e-5)
        assert decision.point.min() >= 0
        assert decision.point.max() <= 1
        assert model(decision.point).argmax(1) != y
    else:
        draws = torch.Generator().manual_seed(seed)
        z = ball(threat).random_start(x.expand(500, *SHAPE), draws)
        assert bool((model(z).argmax(1) == y).all())
