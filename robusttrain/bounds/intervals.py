"""Interval arithmetic: bounds on the outputs of a network for all inputs within bounds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.errors import InputError
from robusttrain.models import reason_of
from robusttrain.models.modes import modes_restored
from robusttrain.noise.layer import predicts_randomly
from robusttrain.seeding import generator_for
from robusttrain.threat import Norm

# The radius of the ball whose bounds are tried, and what they may miss by rounding, relative to the
# largest output. A skipped normalisation or activation moves outputs by far more.
TRIED, ROUNDING = 1e-3, 1e-4


class NoRuleError(InputError, AttributeError):
    """The network contains an operation without known bounds."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"interval bounds go through convolutions, affine layers, BatchNorm, pooling, sums, "
            f"means, changes of shape and increasing activations, and not through {what}"
        )


class Interval:
    """The set of tensors that differ from `centre` by at most `radius` in each element.

    An interval can replace a batch of images in a network, as in `model(interval)`. The result
    contains the outputs for all members of the interval, up to rounding (interval bound
    propagation, Gowal et al. 2018, "On the effectiveness of interval bound propagation"). The
    bounds are differentiable. Layers have to be in eval mode. To code that asks, an interval is a
    tensor.

    Parameters
    ----------
    centre, radius
        Tensors of the same shape; all radii are 0 or more.
    affine
        If the interval is the output of an affine layer, the input interval and the weight of that
        layer.
    """

    # Read by `FirstConv2d`: bounds are not differentiated with respect to images.
    requires_grad = False

    def __init__(
        self, centre: Tensor, radius: Tensor, affine: "tuple[Interval, Tensor] | None" = None
    ) -> None:
        self.centre, self.radius, self.affine = centre, radius, affine

    # Layers that ask whether they are given a tensor, such as normalisations, treat bounds as one.
    __class__ = property(lambda self: Tensor)

    @classmethod
    def between(cls, lower: Tensor, upper: Tensor) -> "Interval":
        """The interval from `lower` to `upper`."""
        return cls((upper + lower) / 2, (upper - lower) / 2)

    @classmethod
    def around(cls, x: Tensor, eps: float) -> "Interval":
        """The linf ball of radius `eps` around images `x`, intersected with the box [0, 1]."""
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

    @property
    def dtype(self) -> torch.dtype:
        return self.centre.dtype

    @property
    def ndim(self) -> int:
        return self.centre.ndim

    def dim(self) -> int:
        return self.centre.dim()

    def size(self, *dim: int) -> Any:
        return self.centre.size(*dim)

    def is_floating_point(self) -> bool:
        return self.centre.is_floating_point()

    def __len__(self) -> int:
        return len(self.centre)

    def clone(self) -> "Interval":
        """The same interval, which operations in place can change."""
        return Interval(self.centre, self.radius, self.affine)

    def margins(self, y: Tensor) -> Tensor:
        """Upper bounds (N, K) on z_k - z_y for logits z in this interval (N, K); 0 for k = y.

        Taken as logits with the label y, they are the worst case of the paper: no member of the
        interval has a larger cross-entropy. After an affine layer z = W h + b the bounds are those
        of (w_k - w_y) h, which are tighter than a difference of the bounds of z (elision of the
        last layer).
        """
        if self.affine is None:
            others = self.upper - self.lower.gather(1, y[:, None])
            return others.scatter(1, y[:, None], 0.0)
        h, weight = self.affine
        apart = (weight - weight[y][:, None]).abs()
        reach = (apart @ h.radius[:, :, None]).squeeze(2)
        return self.centre - self.centre.gather(1, y[:, None]) + reach

    def __getattr__(self, name: str) -> NoReturn:
        raise NoRuleError(name)

    def __add__(self, other: "Interval | Tensor | float") -> "Interval":
        if isinstance(other, Interval):
            return Interval(self.centre + other.centre, self.radius + other.radius)
        centre = self.centre + other
        return Interval(centre, self.radius.expand(centre.shape))

    def __radd__(self, other: float) -> "Interval":
        return self + other

    def __neg__(self) -> "Interval":
        return Interval(-self.centre, self.radius)

    def __sub__(self, other: "Interval | Tensor | float") -> "Interval":
        return self + (-other)

    def __rsub__(self, other: float) -> "Interval":
        return -self + other

    # `Any`, since tensors and numbers have no common type that Python's `abs` accepts.
    def __mul__(self, factor: Any) -> "Interval":
        return Interval(self.centre * factor, self.radius * abs(factor))

    def __rmul__(self, factor: float) -> "Interval":
        return self * factor

    def __truediv__(self, divisor: Any) -> "Interval":
        return Interval(self.centre / divisor, self.radius / abs(divisor))

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> "Interval":
        rule, args, keys = resolved(function, args, kwargs, cls)
        return rule(*args, **keys)

    def become(self, other: "Interval") -> "Interval":
        """This object with the bounds of `other`, as after an operation in place."""
        self.centre, self.radius, self.affine = other.centre, other.radius, other.affine
        return self


def resolved(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    kind: type[Interval],
) -> tuple[Callable[..., Interval], tuple[Any, ...], dict[str, Any]]:
    """The rule of `function`, with the arguments of a call, of which the first is by position.

    Raises
    ------
    InputError
        If there is none, or if its operands are not of type `kind`.
    """
    rule, keys = RULES.get(function), dict(kwargs or {})
    if not args:
        # torch calls its first argument `input`, or `tensors` if it takes several.
        args = (keys.pop("tensors" if "tensors" in keys else "input", None),)
    operands = args[0] if isinstance(args[0], list | tuple) else args[:1]
    if rule is None or not all(type(operand) is kind for operand in operands):
        raise NoRuleError(getattr(function, "__name__", type(function).__name__))
    return rule, args, keys


def _refused(name: str) -> Callable[..., NoReturn]:
    def operator(self: Interval, *operands: Any) -> NoReturn:
        raise NoRuleError(name)

    return operator


# Python looks these operators up in the class, and has a default for some of them.
for _name in (
    "__bool__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__iter__",
    "__pow__", "__rpow__", "__matmul__", "__rmatmul__", "__rtruediv__", "__abs__",
):  # fmt: skip
    setattr(Interval, _name, _refused(_name))


def refuse_unbounded(
    model: nn.Module, image_shape: tuple[int, int, int], norm: Norm, reason: str
) -> None:
    """Raise `InputError` if bounds cannot be used for `model` in `norm`.

    That is, if the norm is not linf, if the model draws noise in prediction, if it has an operation
    without known bounds, or if it treats bounds otherwise than images. `reason` is the option that
    needs bounds, for the message.
    """
    allowed = f"linf with {reason}: bounds hold on a box"
    ranges.require(norm == Norm.linf, "norm", norm, allowed)
    allowed = f"false with {reason}: bounds hold for a network without noise"
    ranges.require(not predicts_randomly(model), "noise.predict", True, allowed)
    problem = "cannot be used with this model"
    try:
        with modes_restored(model), torch.no_grad():
            ok = _bounds_hold(model.eval(), image_shape)
    # Code that is not made for bounds may raise anything.
    except Exception as error:
        raise InputError(reason, allowed=reason_of(error), problem=problem) from error
    if not ok:
        allowed = "its outputs leave their bounds, which it treats otherwise than images"
        raise InputError(reason, allowed=allowed, problem=problem)


def _bounds_hold(model: nn.Module, image_shape: tuple[int, int, int]) -> bool:
    """Whether the outputs at the centre and two corners of a ball are within their bounds."""
    x = torch.rand(1, *image_shape, generator=generator_for(0, "image within bounds"))
    ball = Interval.around(x, TRIED)
    bounds = model(ball)
    outputs = [model(point) for point in (x, ball.lower, ball.upper)]
    slack = ROUNDING * (1 + bounds.centre.abs().amax())
    # Of a deep network bounds can be infinite, or NaN, and prove nothing.
    outside = [(z - bounds.centre).abs() > bounds.radius + slack for z in outputs]
    return not bool(torch.cat(outside).any())


def _linear(x: Interval, weight: Tensor, bias: Tensor | None = None) -> Interval:
    centre, radius = F.linear(x.centre, weight, bias), F.linear(x.radius, weight.abs())
    return Interval(centre, radius, (x, weight))


def _convolution(
    x: Interval, weight: Tensor, bias: Tensor | None = None, *args: Any, **keys: Any
) -> Interval:
    centre = F.conv2d(x.centre, weight, bias, *args, **keys)
    return Interval(centre, F.conv2d(x.radius, weight.abs(), None, *args, **keys))


def _batch_norm(
    x: Interval,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Interval:
    if training or running_mean is None or running_var is None:
        raise NoRuleError("statistics of a batch: BatchNorm has to be in eval mode")
    scale, shift = _scale_and_shift(x.dim(), running_mean, running_var, weight, bias, eps)
    return Interval(torch.addcmul(shift, x.centre, scale), x.radius * scale.abs())


def normalised(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` in eval mode, with gradients with respect to the statistics, too."""
    scale, shift = _scale_and_shift(x.dim(), running_mean, running_var, weight, bias, eps)
    return torch.addcmul(shift, x, scale)


def _scale_and_shift(
    dim: int,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The factor and the summand of BatchNorm in eval mode, for inputs of `dim` axes."""
    scale = running_var.add(eps).rsqrt() * (1.0 if weight is None else weight)
    shift = (0.0 if bias is None else bias) - running_mean * scale
    shape = 1, -1, *[1] * (dim - 2)
    return scale.view(shape), shift.view(shape)


def _cat(parts: Sequence[Interval], dim: int = 0) -> Interval:
    centres, radii = zip(*((part.centre, part.radius) for part in parts), strict=True)
    return Interval(torch.cat(centres, dim), torch.cat(radii, dim))


def _dropout(x: Interval, p: float = 0.5, training: bool = True, inplace: bool = False) -> Interval:
    if training:
        raise NoRuleError("dropout, which has to be in eval mode")
    return x


def _nonnegative_linear(
    function: Callable[..., Tensor], x: Interval, *args: Any, **keys: Any
) -> Interval:
    """A linear function with nonnegative weights, which moves, repeats or averages elements."""
    return Interval(function(x.centre, *args, **keys), function(x.radius, *args, **keys))


def _increasing(
    function: Callable[..., Tensor], x: Interval, *args: Any, inplace: bool = False, **keys: Any
) -> Interval:
    """A function that is nondecreasing in each element."""
    result = Interval.between(function(x.lower, *args, **keys), function(x.upper, *args, **keys))
    # In place, callers that kept `x` must see the result.
    return x.become(result) if inplace else result


def _increasing_for(
    function: Callable[..., Tensor], x: Interval, slope: float, inplace: bool = False
) -> Interval:
    """A function that is nondecreasing unless its parameter `slope` is negative."""
    if slope < 0:
        raise NoRuleError(f"{function.__name__} with a negative parameter")
    return _increasing(function, x, slope, inplace=inplace)


_INCREASING = (
    F.relu, torch.relu, F.relu6, F.hardtanh, F.celu, F.selu, F.softplus, F.logsigmoid,
    F.hardsigmoid, F.softsign, torch.tanh, torch.sigmoid, torch.clamp, F.max_pool2d,
    torch.max_pool2d, F.adaptive_max_pool2d,
)  # fmt: skip
NONNEGATIVE_LINEAR = (
    torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.permute, torch.transpose,
    torch.repeat_interleave, torch.mean, torch.sum, F.avg_pool2d, F.adaptive_avg_pool2d,
)  # fmt: skip

RULES: dict[Callable[..., Any], Callable[..., Interval]] = {
    F.linear: _linear,
    F.conv2d: _convolution,
    F.batch_norm: _batch_norm,
    torch.cat: _cat,
    F.dropout: _dropout,
    F.dropout2d: _dropout,
    F.leaky_relu: lambda x, negative_slope=0.01, inplace=False: _increasing_for(
        F.leaky_relu, x, negative_slope, inplace
    ),
    F.elu: lambda x, alpha=1.0, inplace=False: _increasing_for(F.elu, x, alpha, inplace),
    **{function: partial(_increasing, function) for function in _INCREASING},
    **{function: partial(_nonnegative_linear, function) for function in NONNEGATIVE_LINEAR},
}

# Methods of tensors with the same rules. `view` is that of the centre alone, since the radius may
# have another layout.
METHODS: dict[str, Callable[..., Interval]] = {
    **{name: partial(_increasing, getattr(Tensor, name)) for name in (
        "relu", "tanh", "sigmoid", "clamp", "clamp_min", "clamp_max",
    )},
    **{name: partial(_nonnegative_linear, getattr(Tensor, name)) for name in (
        "flatten", "reshape", "squeeze", "unsqueeze", "permute", "transpose", "contiguous",
        "repeat_interleave", "mean", "sum", "__getitem__",
    )},
    "view": partial(_nonnegative_linear, Tensor.reshape),
    "add_": lambda x, other: x.become(x + other),
    "sub_": lambda x, other: x.become(x - other),
    "mul_": lambda x, factor: x.become(x * factor),
    "div_": lambda x, divisor: x.become(x / divisor),
}  # fmt: skip


def _method(rule: Callable[..., Interval]) -> Callable[..., Interval]:
    def method(self: Interval, *args: Any, **keys: Any) -> Interval:
        return rule(self, *args, **keys)

    return method


for _name, _rule in METHODS.items():
    setattr(Interval, _name, _method(_rule))
