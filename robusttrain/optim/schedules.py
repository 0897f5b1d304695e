"""Learning rate schedules, as shares of the peak rate; they step after every batch."""

import math
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from robusttrain import ranges


@runtime_checkable
class Stepping(Protocol):
    """What training asks of a schedule: a step after each batch, and the rate of each group."""

    def step(self) -> None:
        """Set the rates for the next batch."""

    def get_last_lr(self) -> list[float]:
        """The present rates."""


class Schedule(Protocol):
    """Settings of a learning rate schedule."""

    def build(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """The schedule over `total_steps` batches; the rate of `optimizer` is its peak."""


@dataclass
class Constant:
    """The peak rate throughout, after an optional warm-up.

    Parameters
    ----------
    warmup
        Share of the training, from 0 to below 1, over which the rate first grows linearly from 0 to
        its peak.
    """

    warmup: float = 0.0

    def __post_init__(self) -> None:
        ranges.require(0 <= self.warmup < 1, "warmup", self.warmup, "from 0 to below 1")

    def build(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """A linear warm-up, then `share` over the remaining steps."""
        warm = round(self.warmup * total_steps)
        rest = max(1, total_steps - warm)
        return LambdaLR(
            optimizer, lambda step: step / warm if step < warm else self.share(step - warm, rest)
        )

    def share(self, step: int, steps: int) -> float:
        """Share of the peak rate at `step`, from 0 on, of the `steps` after the warm-up."""
        return 1.0


@dataclass
class Cosine(Constant):
    """Half a cosine wave down to 0 (Loshchilov and Hutter 2017)."""

    def share(self, step: int, steps: int) -> float:
        return (1 + math.cos(math.pi * step / steps)) / 2


@dataclass
class OneCycle(Constant):
    """Linearly up to the peak until `warmup`, then linearly down to 0.

    This is the triangle of fast adversarial training (Wong, Rice and Kolter 2020).
    """

    warmup: float = 0.4

    def share(self, step: int, steps: int) -> float:
        return 1 - step / steps


@dataclass
class Step(Constant):
    """The rate is multiplied by `gamma` at each milestone.

    Parameters
    ----------
    warmup
        As for `Constant`.
    milestones
        Shares of the training after the warm-up, each from 0 to 1.
    gamma
        Factor of the rate at a milestone, above 0.
    """

    milestones: list[float] = field(default_factory=lambda: [0.5, 0.75])
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.above(0, gamma=self.gamma)
        for milestone in self.milestones:
            ranges.within(0, 1, milestones=milestone)

    def unused(self) -> dict[str, str]:
        """The factor, without milestones."""
        return {} if self.milestones else {"gamma": "milestones"}

    def share(self, step: int, steps: int) -> float:
        passed = sum(step >= round(milestone * steps) for milestone in self.milestones)
        return self.gamma**passed
