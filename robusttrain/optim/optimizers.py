"""torch's optimisers, with their settings as configuration."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from robusttrain import ranges

Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


class Optimizer(Protocol):
    """Settings of an optimiser; `lr` is its peak learning rate."""

    lr: float

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        """The optimiser of `parameters`, which may be groups with their own settings."""


@dataclass
class SGD:
    """Stochastic gradient descent with momentum.

    Parameters
    ----------
    lr
        Peak learning rate, above 0.
    momentum
        Factor of the previous step in the next one, from 0 to below 1.
    weight_decay
        Factor of the weights that is added to the gradient (an l2 penalty), 0 or more.
    nesterov
        Whether to use Nesterov momentum, which needs `momentum` above 0.
    """

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False

    def __post_init__(self) -> None:
        ranges.above(0, lr=self.lr)
        allowed = "from 0 to below 1"
        ranges.require(0 <= self.momentum < 1, "momentum", self.momentum, allowed)
        ranges.at_least(0, weight_decay=self.weight_decay)
        ranges.require(
            self.momentum > 0 or not self.nesterov, "nesterov", True, "false when momentum=0"
        )

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        """`torch.optim.SGD` in its fused form, which passes over each parameter once."""
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
    """Adam (Kingma and Ba 2015).

    Parameters
    ----------
    lr
        Peak learning rate, above 0.
    weight_decay
        Factor of the weights that is added to the gradient (an l2 penalty), 0 or more.
    """

    lr: float = 5e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        ranges.above(0, lr=self.lr)
        ranges.at_least(0, weight_decay=self.weight_decay)

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        """`torch.optim.Adam` in its fused form."""
        return torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay, fused=True)


@dataclass
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    Parameters
    ----------
    lr
        Peak learning rate, above 0.
    weight_decay
        Share of the weights, times the learning rate, that is subtracted in each step, 0 or more.
    """

    weight_decay: float = 0.01

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        """`torch.optim.AdamW` in its fused form."""
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay, fused=True)
