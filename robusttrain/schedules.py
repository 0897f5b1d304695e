"""Learning rate schedules of torch, stepped after every batch, with a linear warm-up in front."""

from dataclasses import dataclass, field
from typing import Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)

from robusttrain import ranges

# LinearLR refuses a factor of exactly 0.
NEARLY_ZERO = 1e-4


class Schedule(Protocol):
    """Settings that make a learning rate schedule."""

    def build(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """The schedule over `total_steps` optimiser steps, from the peak rate of `optimizer`."""


@dataclass
class Constant:
    """The peak rate throughout, after `warmup`, a share of the training from 0 to below 1."""

    warmup: float = 0.0

    def __post_init__(self) -> None:
        ranges.require(0 <= self.warmup < 1, "warmup", self.warmup, "from 0 to below 1")

    def build(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Warm-up, then the schedule proper over the remaining steps."""
        steps = round(self.warmup * total_steps)
        if steps == 0:
            return self.after_warmup(optimizer, total_steps)
        warmup = LinearLR(optimizer, NEARLY_ZERO, total_iters=steps)
        return SequentialLR(
            optimizer, [warmup, self.after_warmup(optimizer, total_steps - steps)], [steps]
        )

    def after_warmup(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        """The schedule of the steps behind the warm-up."""
        return ConstantLR(optimizer, factor=1, total_iters=0)


@dataclass
class Cosine(Constant):
    """Half a cosine wave down to 0."""

    def after_warmup(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        """Cosine annealing over `steps`."""
        return CosineAnnealingLR(optimizer, T_max=max(1, steps))


@dataclass
class OneCycle(Constant):
    """Up to the peak in a straight line until `warmup`, then straight down to 0.

    The triangle of fast adversarial training (Wong, Rice and Kolter 2020).
    """

    warmup: float = 0.4

    def after_warmup(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        """A straight line down to 0 over `steps`."""
        return LinearLR(optimizer, 1, NEARLY_ZERO, total_iters=max(1, steps))


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

    def after_warmup(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        """Drops at the milestones."""
        return MultiStepLR(optimizer, [round(m * steps) for m in self.milestones], self.gamma)
