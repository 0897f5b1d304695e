"""Learning rate schedules, stepped after every batch, each a share of the peak rate."""

import math
from dataclasses import dataclass, field
from typing import Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from robusttrain import ranges


class Schedule(Protocol):
    """Settings that make a learning rate schedule."""

    def build(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """The schedule over `total_steps` optimiser steps, from the peak rate of `optimizer`."""


@dataclass
class Constant:
    """The peak rate throughout.

    Parameters
    ----------
    warmup
        Share of the training, from 0 to below 1, in which the rate first climbs from 0 to its peak
        in a straight line.
    """

    warmup: float = 0.0

    def __post_init__(self) -> None:
        ranges.require(0 <= self.warmup < 1, "warmup", self.warmup, "from 0 to below 1")

    def build(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Warm-up, then `share` over the remaining steps."""
        warm = round(self.warmup * total_steps)
        rest = max(1, total_steps - warm)
        return LambdaLR(
            optimizer, lambda step: step / warm if step < warm else self.share(step - warm, rest)
        )

    def share(self, step: int, steps: int) -> float:
        """Share of the peak rate at `step` of the `steps` behind the warm-up."""
        return 1.0


@dataclass
class Cosine(Constant):
    """Half a cosine wave down to 0 (Loshchilov and Hutter 2017)."""

    def share(self, step: int, steps: int) -> float:
        return (1 + math.cos(math.pi * step / steps)) / 2


@dataclass
class OneCycle(Constant):
    """Up to the peak in a straight line until `warmup`, then straight down to 0.

    The triangle of fast adversarial training (Wong, Rice and Kolter 2020).
    """

    warmup: float = 0.4

    def share(self, step: int, steps: int) -> float:
        return 1 - step / steps


@dataclass
class Step(Constant):
    """The rate times `gamma` at each of `milestones`, shares of the training behind the warm-up."""

    milestones: list[float] = field(default_factory=lambda: [0.5, 0.75])
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.above(0, gamma=self.gamma)
        for milestone in self.milestones:
            ranges.within(0, 1, milestones=milestone)

    def share(self, step: int, steps: int) -> float:
        passed = sum(step >= round(milestone * steps) for milestone in self.milestones)
        return self.gamma**passed
