"""Learning rates step by step against closed forms."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from robusttrain.errors import InputError
from robusttrain.optim.schedules import Constant, Cosine, OneCycle, Schedule, Step

PEAK = 0.8


def rates(schedule: Schedule, steps: int) -> list[float]:
    """The rate of each step, and the rate after the last one."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = schedule.build(optimizer, steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return [*seen, optimizer.param_groups[0]["lr"]]


def after_warmup(step: int, warm: int, shape: Callable[[int], float]) -> float:
    return step / warm if step < warm else shape(step - warm)


@pytest.mark.parametrize("warmup", [0.0, 0.25])
@pytest.mark.parametrize("steps", [4, 40, 97])
def test_each_schedule_is_its_closed_form(steps: int, warmup: float) -> None:
    warm = round(warmup * steps)
    rest = steps - warm
    drops = [round(0.3 * rest), round(0.6 * rest)]
    shapes: list[tuple[Schedule, Callable[[int], float]]] = [
        (Constant(warmup), lambda step: 1.0),
        (Cosine(warmup), lambda step: (1 + math.cos(math.pi * step / rest)) / 2),
        (OneCycle(warmup), lambda step: 1 - step / rest),
        (
            Step(warmup, milestones=[0.3, 0.6], gamma=0.2),
            lambda step: 0.2 ** sum(step >= drop for drop in drops),
        ),
    ]
    for schedule, shape in shapes:
        expected = [PEAK * after_warmup(step, warm, shape) for step in range(steps + 1)]
        assert rates(schedule, steps) == pytest.approx(expected, abs=2e-4 * PEAK), schedule


def test_the_triangle_peaks_at_its_warmup_and_ends_near_zero() -> None:
    seen = rates(OneCycle(), 100)
    assert seen.index(max(seen)) == 40
    assert seen[40] == pytest.approx(PEAK)
    assert seen[0] < 1e-3 * PEAK
    assert seen[99] == pytest.approx(PEAK / 60, rel=0.01)
    assert seen[100] < 1e-3 * PEAK
    assert seen[:41] == sorted(seen[:41])
    assert seen[40:] == sorted(seen[40:], reverse=True)


@pytest.mark.parametrize("schedule", [Constant(), Cosine(), OneCycle()])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_shortest_training_has_a_rate(schedule: Schedule, steps: int) -> None:
    seen = rates(schedule, steps)[:-1]
    assert max(seen) == pytest.approx(PEAK)


def test_milestones_may_coincide() -> None:
    assert rates(Step(milestones=[0.5, 0.5], gamma=0.1), 10)[5] == pytest.approx(PEAK / 100)


@pytest.mark.parametrize("warmup", [-0.1, 1.0, float("nan")])
@pytest.mark.parametrize("schedule", [Constant, Cosine, OneCycle, Step])
def test_the_warmup_is_a_share(schedule: type[Constant], warmup: float) -> None:
    with pytest.raises(InputError, match=r"^warmup=.*from 0 to below 1"):
        schedule(warmup)


def test_drops_are_checked() -> None:
    with pytest.raises(InputError, match=r"^milestones=1.5 is not allowed"):
        Step(milestones=[0.5, 1.5])
    with pytest.raises(InputError, match=r"^gamma=0 is not allowed"):
        Step(gamma=0)
