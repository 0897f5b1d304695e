"""Interval arithmetic: bounds on what a network can return for any input within bounds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from robusttrain.errors import InputError


class _NoRuleError(InputError, AttributeError):
    """Raised where a network does something whose bounds are not known."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"interval bounds go through convolutions, affine layers, BatchNorm, pooling, sums and "
            f"increasing activations, and not through {what}"
        )


class Interval:
    """Every tensor that differs from `centre` by at most `radius` in each element.

    It goes through a network in the place of a batch of images, as `model(interval)`, and what
    comes out contains the outputs of all its members (interval bound propagation, Gowal et al.
    2018, "On the effectiveness of interval bound propagation"), up to rounding. Bounds
    are differentiable. Layers have to be in eval mode.

    Parameters
    ----------
    centre, radius
        Of one shape; no radius is below 0.
    """

    # What `FirstConv2d` asks for: nobody differentiates bounds with respect to images.
    requires_grad = False

    def __init__(self, centre: Tensor, radius: Tensor) -> None:
        self.centre, self.radius = centre, radius

    @classmethod
    def between(cls, lower: Tensor, upper: Tensor) -> "Interval":
        """The interval with these ends."""
        return cls((upper + lower) / 2, (upper - lower) / 2)

    @classmethod
    def around(cls, x: Tensor, eps: float) -> "Interval":
        """The ball of radius `eps` in linf around images `x`, cut with [0, 1]."""
        return cls.between((x - eps).clamp(min=0), (x + eps).clamp(max=1))

    @property
    def lower(self) -> Tensor:
        return self.centre - self.radius

    @property
    def upper(self) -> Tensor:
        return self.centre + self.radius

    @property
    def shape(self) -> torch.Size:
        return self.centre.shape

    @property
    def device(self) -> torch.device:
        return self.centre.device

    def dim(self) -> int:
        return self.centre.dim()

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> "Interval":
        """As `Tensor.flatten`."""
        return _elsewhere(torch.flatten, self, start_dim, end_dim)

    def margins(self, y: Tensor) -> Tensor:
        """Upper bounds (N, K) on z_k - z_y of logits z within the interval (N, K); 0 for k = y.

        As logits with the label y they are the worst case of the paper: no member has a larger
        cross-entropy.
        """
        others = self.upper - self.lower.gather(1, y[:, None])
        return others.scatter(1, y[:, None], 0.0)

    def __getattr__(self, name: str) -> Any:
        raise _NoRuleError(name)

    def __add__(self, other: "Interval | Tensor | float") -> "Interval":
        if isinstance(other, Interval):
            return Interval(self.centre + other.centre, self.radius + other.radius)
        return Interval(self.centre + other, self.radius)

    __radd__ = __add__

    def __neg__(self) -> "Interval":
        return Interval(-self.centre, self.radius)

    def __sub__(self, other: "Interval | Tensor | float") -> "Interval":
        return self + (-other)

    def __rsub__(self, other: Tensor | float) -> "Interval":
        return -self + other

    def __mul__(self, factor: Tensor | float) -> "Interval":
        return Interval(self.centre * factor, self.radius * torch.as_tensor(factor).abs())

    __rmul__ = __mul__

    def __truediv__(self, divisor: Tensor | float) -> "Interval":
        return Interval(self.centre / divisor, self.radius / torch.as_tensor(divisor).abs())

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> "Interval":
        rule = _RULES.get(function)
        if rule is None:
            raise _NoRuleError(getattr(function, "__name__", type(function).__name__))
        return rule(*args, **(kwargs or {}))


class _Affine(Interval):
    """What an affine layer gives, with what it was given: differences of outputs are tighter."""

    def __init__(self, x: Interval, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(F.linear(x.centre, weight, bias), F.linear(x.radius, weight.abs()))
        self.x, self.weight = x, weight

    def margins(self, y: Tensor) -> Tensor:
        """|w_k - w_y| r in the place of (|w_k| + |w_y|) r (elision of the last layer)."""
        classes = len(self.weight)
        apart = (self.weight[:, None] - self.weight).abs().flatten(0, 1)
        reach = F.linear(self.x.radius, apart).view(-1, classes, classes)
        own = reach[torch.arange(len(y), device=y.device), y]
        return self.centre - self.centre.gather(1, y[:, None]) + own


def _linear(x: Interval, weight: Tensor, bias: Tensor | None = None) -> Interval:
    return _Affine(x, weight, bias)


def _convolution(
    x: Interval, weight: Tensor, bias: Tensor | None = None, *arguments: Any, **keys: Any
) -> Interval:
    centre = F.conv2d(x.centre, weight, bias, *arguments, **keys)
    return Interval(centre, F.conv2d(x.radius, weight.abs(), None, *arguments, **keys))


def _batch_norm(
    x: Interval,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Interval:
    if training or mean is None or variance is None:
        raise InputError("interval bounds need the running statistics of BatchNorm, in eval mode")
    centre = F.batch_norm(x.centre, mean, variance, weight, bias, eps=eps)
    scale = variance.add(eps).rsqrt() if weight is None else weight * variance.add(eps).rsqrt()
    return Interval(centre, x.radius * scale.abs().view(1, -1, *[1] * (x.dim() - 2)))


def _cat(parts: Sequence[Interval], dim: int = 0) -> Interval:
    centres, radii = zip(*((part.centre, part.radius) for part in parts), strict=True)
    return Interval(torch.cat(centres, dim), torch.cat(radii, dim))


def _dropout(x: Interval, p: float = 0.5, training: bool = True, inplace: bool = False) -> Interval:
    if training:
        raise InputError("interval bounds need dropout in eval mode")
    return x


def _elsewhere(function: Callable[..., Tensor], x: Interval, *args: Any, **keys: Any) -> Interval:
    """What moves elements, or averages them."""
    return Interval(function(x.centre, *args, **keys), function(x.radius, *args, **keys))


def _increasing(function: Callable[..., Tensor], x: Interval, *args: Any, **keys: Any) -> Interval:
    """What becomes no smaller where an element becomes larger."""
    keys.pop("inplace", None)
    return Interval.between(function(x.lower, *args, **keys), function(x.upper, *args, **keys))


_INCREASING = (
    F.relu, torch.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.celu, F.selu, F.softplus,
    F.logsigmoid, F.hardsigmoid, F.softsign, torch.tanh, torch.sigmoid, F.max_pool2d,
    torch.max_pool2d, F.adaptive_max_pool2d, torch.clamp,
)  # fmt: skip
_ELSEWHERE = (torch.flatten, F.avg_pool2d, F.adaptive_avg_pool2d)

_RULES: dict[Callable[..., Any], Callable[..., Interval]] = {
    F.linear: _linear,
    F.conv2d: _convolution,
    F.batch_norm: _batch_norm,
    torch.cat: _cat,
    F.dropout: _dropout,
    F.dropout2d: _dropout,
    **{function: partial(_increasing, function) for function in _INCREASING},
    **{function: partial(_elsewhere, function) for function in _ELSEWHERE},
}
