"""Optimisers: one step by hand, and the ranges of their settings."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from robusttrain.errors import InputError
from robusttrain.optim.optimizers import SGD, Adam, AdamW, Optimizer

START, SLOPE = 2.0, 0.5


def steps(optimizer: Optimizer, count: int) -> list[float]:
    """The parameter after each step on a linear function of fixed slope."""
    parameter = nn.Parameter(torch.tensor([START]))
    built = optimizer.build([parameter])
    seen = []
    for _ in range(count):
        parameter.grad = torch.tensor([SLOPE])
        built.step()
        seen.append(parameter.item())
    return seen


def test_sgd_is_momentum_with_an_l2_penalty() -> None:
    velocity, expected, at = 0.0, [], START
    for _ in range(3):
        velocity = 0.9 * velocity + SLOPE + 0.01 * at
        at -= 0.1 * velocity
        expected.append(at)
    assert steps(SGD(0.1, 0.9, 0.01), 3) == pytest.approx(expected, rel=1e-6)


def test_nesterov_looks_ahead() -> None:
    first = START - 0.1 * (SLOPE + 0.9 * SLOPE)
    assert steps(SGD(0.1, 0.9, 0.0, nesterov=True), 1) == pytest.approx([first], rel=1e-6)


def test_adam_moves_by_the_rate_on_a_line() -> None:
    expected = [START - 0.01 * step for step in (1, 2, 3)]
    assert steps(Adam(0.01), 3) == pytest.approx(expected, rel=1e-5)


def test_the_weight_decay_of_adamw_is_decoupled_and_that_of_adam_is_not() -> None:
    # Adam divides the penalty away together with the gradient, AdamW shrinks the weight separately.
    assert steps(Adam(0.01, 0.5), 1) == pytest.approx([START - 0.01], rel=1e-5)
    assert steps(AdamW(0.01, 0.5), 1) == pytest.approx([START * (1 - 0.005) - 0.01], rel=1e-5)


BAD: list[tuple[Callable[[], Optimizer], str]] = [
    (lambda: SGD(lr=0), "lr=0"),
    (lambda: SGD(lr=float("inf")), "lr=inf"),
    (lambda: SGD(momentum=-0.1), "momentum=-0.1"),
    (lambda: SGD(weight_decay=-1), "weight_decay=-1"),
    (lambda: SGD(momentum=0, nesterov=True), "nesterov=True"),
    (lambda: Adam(lr=-1e-3), "lr=-0.001"),
    (lambda: Adam(lr=float("nan")), "lr=nan"),
    (lambda: Adam(weight_decay=-1), "weight_decay=-1"),
    (lambda: AdamW(lr=0), "lr=0"),
    (lambda: AdamW(weight_decay=float("nan")), "weight_decay=nan"),
]


@pytest.mark.parametrize(("make", "named"), BAD, ids=[named for _, named in BAD])
def test_settings_out_of_range_are_refused(make: Callable[[], Optimizer], named: str) -> None:
    with pytest.raises(InputError, match=rf"^{named} is not allowed: it must be "):
        make()
