"""Training on linear bounds of the margins, between interval bounds of hidden layers."""

from dataclasses import dataclass, replace
from typing import Self, cast

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.bounds.graph import Graph
from robusttrain.bounds.inputs import InputSet
from robusttrain.bounds.intervals import Interval
from robusttrain.bounds.linear import Backward, differences, other_classes
from robusttrain.defenses import each_row
from robusttrain.defenses.ibp import IBP


@dataclass(frozen=True)
class _Box:
    """A box as the input of linear bounds."""

    box: Interval

    @property
    def x(self) -> Tensor:
        return self.box.centre

    def minimum(self, coefficients: Tensor) -> Tensor:
        """The least value (S, N) of linear functions (S, N, ...) over the box."""
        least = coefficients * self.box.centre - coefficients.abs() * self.box.radius
        return least.flatten(2).sum(2)


@dataclass
class CROWNIBP(IBP):
    """min E[ (1 - weight) L(f(x), y) + weight L(m(x), y) ] (Zhang et al. 2020, CROWN-IBP).

    "Towards stable and efficient training of verifiably robust neural networks". m(x) =
    (1 - linear_share) times the worst logits of intervals, as in `IBP`, and linear_share times
    those of a backward pass of linear bounds, with intervals for hidden layers. They are tighter
    early in training. A step with them costs about as many more passes of images as there are
    classes.

    Parameters
    ----------
    attack
        None.
    norm, eps, eps_margin, statistics, regularisation, weight, weight_warmup
        As for `IBP`.
    linear_share
        Share of the linear bounds at the start, from 0 to 1 (the paper's beta). The warm-up of
        `training.curriculum` lowers it to 0. Without a warm-up it stays.
    """

    linear_share: float = 1.0

    def __post_init__(self) -> None:
        ranges.within(0, 1, linear_share=self.linear_share)
        super().__post_init__()

    def refuse_without_effect(self) -> None:
        """Raise `InputError` if it is `IBP`."""
        allowed = "above 0; otherwise, defense=ibp"
        ranges.require(self.linear_share > 0, "linear_share", self.linear_share, allowed)

    def scheduled(self, share: float) -> Self:
        """As in `IBP`, and with the other share of the linear bounds."""
        return replace(super().scheduled(share), linear_share=(1 - share) * self.linear_share)

    def worst_logits(self, model: nn.Module, box: Interval, y: Tensor) -> Tensor:
        """The mixture of both bounds."""
        worst = super().worst_logits(model, box, y)
        if self.linear_share == 0:
            return worst
        linear = _linear_margins(model, box, each_row(y, worst), worst.shape[1])
        return (1 - self.linear_share) * worst + self.linear_share * linear


def _linear_margins(model: nn.Module, box: Interval, y: Tensor, classes: int) -> Tensor:
    """Upper bounds (N, K) on z_k - z_y by linear functions, with their graph; 0 for k = y."""
    graph = Graph(model, box, differentiable=True)
    others = other_classes(y, classes)
    rows = differences(y, others, classes).to(box.dtype)
    # A pass asks its inputs for the least value alone.
    inputs = cast(InputSet, _Box(box))
    least = Backward(graph, inputs)(graph.output, rows).value
    return torch.zeros(len(y), classes, dtype=box.dtype, device=y.device).scatter(
        1, others, -least.T
    )
