"""torch's optimisers, with their settings as configuration."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from robusttrain import ranges

Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


class Optimizer(Protocol):
    """Settings of an optimiser; `lr` is its peak learning rate.

    An optimiser of the user's own may derive from `Grouped`.
    """

    lr: float

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        """The optimiser of `parameters`, which may be groups with their own settings."""


@dataclass(kw_only=True)
class Grouped:
    """Base of the optimisers here: settings that differ between the parameters of a network.

    Parameters
    ----------
    layer_decay
        Factor of the learning rate from each block of the network to the block before it, above 0
        and up to 1 (Clark et al. 2020, ELECTRA; BEiT). The head has the rate `lr`, and the block
        that is followed by k blocks and the head has `lr` times `layer_decay` to the power of
        k + 1. Blocks are those of `training.trainable`; blocks that are frozen count. A schedule
        multiplies all rates alike. Parameters of noise have the rate `lr`.
    decay_norms_and_biases
        Whether weight decay acts on biases and on the parameters of normalisation layers, too,
        that is, also on tensors of one axis or none. It never acts on parameters of noise.
    """

    layer_decay: float = 1.0
    decay_norms_and_biases: bool = True

    def __post_init__(self) -> None:
        allowed = "above 0 and up to 1"
        ranges.require(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, allowed)

    def unused(self) -> dict[str, str]:
        """`decay_norms_and_biases` without weight decay."""
        decays = getattr(self, "weight_decay", 1) > 0
        return {} if decays else {"decay_norms_and_biases": "weight_decay"}


@dataclass
class SGD(Grouped):
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
        super().__post_init__()
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
class Adam(Grouped):
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
        super().__post_init__()
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
