"""Optimisers of torch with their settings as configuration."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from robusttrain import ranges

Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


class Optimizer(Protocol):
    """Settings that make an optimiser."""

    lr: float

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        """The optimiser of `parameters`, which may come in groups with settings of their own."""


@dataclass
class SGD:
    """Stochastic gradient descent with momentum.

    Parameters
    ----------
    lr
        The peak of the schedule, above 0.
    momentum
        Share of the last step that the next one keeps, 0 or more.
    weight_decay
        Weight of an l2 penalty in the gradient, 0 or more.
    nesterov
        Whether the gradient is taken behind the momentum step; it needs momentum above 0.
    """

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False

    def __post_init__(self) -> None:
        ranges.above(0, lr=self.lr)
        ranges.at_least(0, momentum=self.momentum, weight_decay=self.weight_decay)
        ranges.require(
            self.momentum > 0 or not self.nesterov, "nesterov", True, "false when momentum=0"
        )

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        """`torch.optim.SGD`, in its fused form: one pass over each parameter."""
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            fused=True,
        )


@dataclass
class Adam:
    """Adam; `lr` is the peak of the schedule, `weight_decay` an l2 penalty in the gradient."""

    lr: float = 5e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        ranges.above(0, lr=self.lr)
        ranges.at_least(0, weight_decay=self.weight_decay)

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        """`torch.optim.Adam`, fused."""
        return torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay, fused=True)


@dataclass
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    weight_decay: float = 0.01

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        """`torch.optim.AdamW`, fused."""
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay, fused=True)
