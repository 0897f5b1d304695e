"""The regularisers of Shi et al. 2021 for the warm-up of training on interval bounds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode

from robusttrain.bounds.intervals import Interval

# A ratio from this value on costs nothing (their tau).
TOLERANCE = 0.5

# Smallest divisor.
TINY = 1e-12

_RELUS = (F.relu, torch.relu, torch.relu_, Tensor.relu)


class ReLUInputs(TorchFunctionMode):
    """Collects the intervals that enter a ReLU in this block, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Interval] = []

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function in _RELUS and args and type(args[0]) is Interval:
            self.found.append(args[0].clone())
        return function(*args, **(kwargs or {}))


def regulariser(box: Interval, relus: Sequence[Interval]) -> Tensor:
    """Tightness of bounds and balance of ReLUs, a mean over ReLU layers (Shi et al. 2021).

    With E the mean over a batch and all neurons, c and r the centres and the radii of the bounds
    before a layer, r_0 those of the images and tau = 0.5, a layer contributes

        max(0, tau - E[r_0] / E[r]) / tau
        + max(0, tau - ratio(E[c; active], -E[c; inactive])) / tau
        + max(0, tau - ratio(E[(c - E[c])^2; active], E[(c - E[c])^2; inactive])) / tau.

    A neuron is active if its bounds are above 0, and inactive if they are below; E[.; active] sums
    over the active ones alone. ratio(a, b) is the smaller one divided by the larger one.

    Parameters
    ----------
    box
        The box of images (N, C, H, W).
    relus
        The bounds before each ReLU layer, one or more.

    Returns
    -------
    A scalar from 0 to 3, with a graph.
    """
    width = box.radius.mean()
    layers = [_excess(width / x.radius.mean().clamp_min(TINY)) + _imbalance(x) for x in relus]
    return torch.stack(layers).mean()


def _imbalance(x: Interval) -> Tensor:
    active, inactive = x.lower > 0, x.upper < 0
    deviation = (x.centre - x.centre.mean()).square()
    means = _ratio((x.centre * active).mean(), -(x.centre * inactive).mean())
    variances = _ratio((deviation * active).mean(), (deviation * inactive).mean())
    return _excess(means) + _excess(variances)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.minimum(a, b) / torch.maximum(a, b).clamp_min(TINY)


def _excess(ratio: Tensor) -> Tensor:
    return (TOLERANCE - ratio).clamp_min(0) / TOLERANCE
