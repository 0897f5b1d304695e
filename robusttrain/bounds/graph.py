"""A network as a graph of affine operations and activations, recorded while it runs.

A `Traced` object takes the place of the images, as an `Interval` does, and knows the operations
that intervals know. Each operation becomes a node with bounds on its result by interval arithmetic.
Piecewise linear operations (LeakyReLU, clamps, max pooling, ...) are recorded as sums of ReLUs, so
that ReLU is the only activation with a kink.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from robusttrain.bounds.intervals import METHODS, Interval, NoRuleError, normalised, resolved
from robusttrain.bounds.pooling import adaptive_windows, windows
from robusttrain.bounds.relaxations import Curvature, Shape
from robusttrain.models.modes import modes_restored

# Bounds contradict each other if they are so many units in the last place apart.
SLACK = 1024

Rule = Callable[[], Interval]
Operation = Callable[..., Tensor]


class Node:
    """An operation: what its result is, and within which bounds, given those of its parents.

    Attributes
    ----------
    parents
        The nodes of its operands.
    rule
        The bounds of the result, (N, ...), by interval arithmetic and the current bounds of others.
    bounds
        The best known bounds.
    """

    def __init__(self, parents: Sequence["Node"], rule: Rule) -> None:
        self.parents, self.rule = tuple(parents), rule
        self.bounds = rule()

    @property
    def size(self) -> int:
        """Elements of the result for one image."""
        return self.bounds.centre[0].numel()

    def also(self, rule: Rule) -> None:
        """Intersect the bounds by `rule`, now and later."""
        first = self.rule
        self.rule = lambda: _intersection(first(), rule())
        self.bounds = self.rule()

    def tighten(self, other: Interval) -> None:
        """Intersect the bounds with `other`, whose NaNs say nothing."""
        self.bounds = _intersection(self.bounds, other)


def _intersection(one: Interval, other: Interval) -> Interval:
    lower = torch.fmax(one.lower, other.lower)
    # Bounds of an empty set, as a branch may have, may cross.
    return Interval.between(lower, torch.maximum(lower, torch.fmin(one.upper, other.upper)))


class Input(Node):
    """The images."""


class Affine(Node):
    """An operation that is affine in all of its operands, and treats each image separately."""

    def __init__(self, parents: Sequence[Node], rule: Rule, operation: Operation) -> None:
        super().__init__(parents, rule)
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            self._zeros = [
                torch.zeros_like(node.bounds.centre).requires_grad_() for node in self.parents
            ]
            self._output = operation(*self._zeros)
        self.offset = self._output if differentiable else self._output.detach()
        self.shifts = bool(self.offset.any())
        self._check()

    def pull(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        """Coefficients (S, N, ...) of the result as coefficients of each operand."""
        # A single function needs no vmap, which takes longer than small operations.
        single = len(coefficients) == 1
        parts = torch.autograd.grad(
            self._output,
            self._zeros,
            coefficients[0] if single else coefficients,
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
            is_grads_batched=not single,
        )
        return tuple(part[None] for part in parts) if single else parts

    def _check(self) -> None:
        """Refuse an operation by which the result of an image depends on another image."""
        count = len(self._zeros[0])
        if len(self.offset) != count:
            raise NoRuleError("a change of the number of images")
        first = torch.zeros_like(self.offset)
        first[0] = 1 + torch.rand(first.shape[1:], generator=torch.Generator()).to(first)
        if any(bool(part[0, 1:].any()) for part in self.pull(first[None])):
            raise NoRuleError("sums over images")


class Activation(Node):
    """A nondecreasing function of each element: ReLU, or a smooth one."""

    def __init__(self, parent: Node, rule: Rule, shape: Shape | None = None) -> None:
        super().__init__([parent], rule)
        self.shape = shape

    @property
    def is_relu(self) -> bool:
        """Whether it is ReLU, whose lower line has a free slope."""
        return self.shape is None

    @property
    def before(self) -> Interval:
        """The bounds of the argument."""
        return self.parents[0].bounds

    @property
    def unstable(self) -> Tensor:
        """Where it is not linear within its bounds, (N, ...)."""
        if not self.is_relu:
            return self.before.radius > 0
        return (self.before.lower < 0) & (self.before.upper > 0)


class Graph:
    """The operations of a network on images within `box`, in the order of their execution.

    Parameters
    ----------
    model
        A network, which is run once, in eval mode and without noise.
    box
        Bounds of N images.
    differentiable
        Whether bounds can be differentiated with respect to the parameters of the network.

    Raises
    ------
    InputError
        If an operation has no bounds, or makes the output of an image depend on another image.
    """

    def __init__(self, model: nn.Module, box: Interval, *, differentiable: bool = False) -> None:
        self.nodes: list[Node] = []
        self.input = self.added(Input([], lambda: box))
        with modes_restored(model), torch.set_grad_enabled(differentiable):
            output = model.eval()(Traced(self, self.input))
        if type(output) is not Traced:
            raise NoRuleError(f"an output of type {type(output).__name__}")
        self.output = output.node
        self._prune()

    def added(self, node: Any) -> Any:
        """`node`, as the last one."""
        self.nodes.append(node)
        return node

    def _prune(self) -> None:
        """Forget what the output does not depend on."""
        used = {self.output}
        for node in reversed(self.nodes):
            if node in used:
                used.update(node.parents)
        self.nodes = [node for node in self.nodes if node in used]

    @property
    def activations(self) -> list[Activation]:
        return [node for node in self.nodes if isinstance(node, Activation)]

    @property
    def relus(self) -> list[Activation]:
        return [node for node in self.activations if node.is_relu]

    @property
    def smooth(self) -> bool:
        """Whether there are activations besides ReLU."""
        return len(self.relus) < len(self.activations)

    def restrict(self, bounds: Mapping[Node, Sequence[Interval]]) -> Tensor:
        """Forget all bounds but these, and those that follow from them.

        Returns
        -------
        Tensor
            For which images (N,) they contradict each other: no input has such results.
        """
        empty = torch.zeros(
            len(self.input.bounds), dtype=torch.bool, device=self.input.bounds.device
        )
        for node in self.nodes[1:]:
            node.bounds = node.rule()
            for given in bounds.get(node, ()):
                gap = torch.maximum(
                    given.lower - node.bounds.upper, node.bounds.lower - given.upper
                )
                slack = SLACK * torch.finfo(gap.dtype).eps * (1 + node.bounds.centre.abs())
                empty |= (gap > slack).flatten(1).any(1)
                node.tighten(given)
        return empty

    @property
    def sizes(self) -> list[int]:
        """The number of elements of each result, for one image."""
        return [node.size for node in self.nodes]


class Traced(Interval):
    """A result inside a network: bounds that remember the operations that they come from."""

    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph, self.node = graph, node

    centre = property(lambda self: self.node.bounds.centre)
    radius = property(lambda self: self.node.bounds.radius)
    affine = property(lambda self: self.node.bounds.affine)

    def clone(self) -> "Traced":
        """The same result, which operations in place can change."""
        return Traced(self.graph, self.node)

    def become(self, other: Interval) -> "Traced":
        """This object with the node of `other`, as after an operation in place."""
        self.node = cast(Traced, other).node
        return self

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> "Traced":
        rule, args, keys = resolved(function, args, kwargs, cls)
        return _recorded(function, rule, args, keys)


def _recorded(
    function: Operation, rule: Callable[..., Interval], args: tuple[Any, ...], keys: dict[str, Any]
) -> Traced:
    """The result of `function`, whose bounds have the rule `rule`, as a new node."""
    traced = _operands(args)
    graph = traced[0].graph
    nodes = [each.node for each in traced]
    inplace = keys.pop("inplace", False)

    def bounds() -> Interval:
        return rule(*_replaced(args, [node.bounds for node in nodes]), **keys)

    def operation(*tensors: Tensor) -> Tensor:
        return FORMS.get(function, function)(*_replaced(args, tensors), **keys)

    if function in RELUS:
        result = Traced(graph, graph.added(Activation(nodes[0], bounds)))
    elif function in PIECEWISE:
        bounds()  # It refuses what has no bounds.
        result = PIECEWISE[function](*args, **keys)
        # Bounds of the function are often tighter than those of the sum.
        result.node.also(bounds)
    elif function in SMOOTH:
        shape = Shape(lambda z: function(z, *args[1:], **keys), SMOOTH[function])
        result = Traced(graph, graph.added(Activation(nodes[0], bounds, shape)))
    else:
        result = Traced(graph, graph.added(Affine(nodes, bounds, operation)))
    return traced[0].become(result) if inplace else result


def _operands(value: Any) -> list[Traced]:
    """The traced objects in the arguments of a call, in order."""
    if isinstance(value, list | tuple):
        return [each for part in value for each in _operands(part)]
    return [value] if type(value) is Traced else []


def _replaced(args: tuple[Any, ...], values: Sequence[Any]) -> tuple[Any, ...]:
    """`args` with `values` in the places of the traced objects, in order."""
    rest = iter(values)

    def replaced(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(replaced(part) for part in value)
        return next(rest) if type(value) is Traced else value

    return cast(tuple[Any, ...], replaced(args))


def _larger(a: Any, b: Any) -> Any:
    return a + F.relu(b - a)


def _leaky_relu(x: Any, negative_slope: float = 0.01) -> Any:
    return x * negative_slope + F.relu(x) * (1 - negative_slope)


def _clamp(x: Any, min: Any = None, max: Any = None) -> Any:
    if min is not None:
        x = F.relu(x - min) + min
    return x if max is None else max - F.relu(max - x)


def _hardtanh(x: Any, min_val: float = -1.0, max_val: float = 1.0) -> Any:
    return _clamp(x, min_val, max_val)


def _largest(x: Any, dim: int, taps: Tensor) -> Any:
    """The largest elements of windows along `dim`, by indices (elements, windows)."""
    parts = [x.index_select(dim, each.to(x.device)) for each in taps]
    while len(parts) > 1:
        parts = [_larger(*pair) for pair in zip(parts[::2], parts[1::2], strict=False)] + (
            parts[-1:] if len(parts) % 2 else []
        )
    return parts[0]


def _max_pool2d(x: Any, kernel_size: Any, stride: Any = None, *args: Any, **keys: Any) -> Any:
    out = F.max_pool2d(torch.empty(1, *x.shape[-2:]), kernel_size, stride, *args, **keys)
    names = dict(zip(("padding", "dilation"), args, strict=False)) | keys
    for dim in (-2, -1):
        kernel = _pair(kernel_size)[dim]
        step = _pair(stride or kernel_size)[dim]
        padding, dilation = _pair(names.get("padding", 0)), _pair(names.get("dilation", 1))
        taps = windows(x.shape[dim], out.shape[dim], kernel, step, padding[dim], dilation[dim])
        x = _largest(x, dim, taps)
    return x


def _adaptive_max_pool2d(x: Any, output_size: Any, return_indices: bool = False) -> Any:
    for dim, size in zip((-2, -1), _pair(output_size), strict=True):
        x = _largest(x, dim, adaptive_windows(x.shape[dim], size or x.shape[dim]))
    return x


def _pair(value: Any) -> tuple[Any, Any]:
    return (
        (value, value)
        if value is None or isinstance(value, int)
        else tuple(value) * (2 // len(value))
    )


# `F.batch_norm` refuses statistics that have a graph, as those of a batch in training do.
FORMS: dict[Operation, Operation] = {F.batch_norm: normalised}

RELUS = {F.relu, torch.relu, Tensor.relu}

PIECEWISE: dict[Callable[..., Any], Callable[..., Any]] = {
    F.leaky_relu: _leaky_relu,
    F.relu6: lambda x: _clamp(x, 0, 6),
    F.hardtanh: _hardtanh,
    F.hardsigmoid: lambda x: _clamp(x + 3, 0, 6) / 6,
    torch.clamp: _clamp,
    Tensor.clamp: _clamp,
    Tensor.clamp_min: _clamp,
    Tensor.clamp_max: lambda x, max: _clamp(x, None, max),
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    F.adaptive_max_pool2d: _adaptive_max_pool2d,
}

SMOOTH: dict[Callable[..., Any], Curvature] = {
    torch.tanh: Curvature.convex_then_concave,
    Tensor.tanh: Curvature.convex_then_concave,
    torch.sigmoid: Curvature.convex_then_concave,
    Tensor.sigmoid: Curvature.convex_then_concave,
    F.softsign: Curvature.convex_then_concave,
    F.softplus: Curvature.convex,
    F.logsigmoid: Curvature.concave,
    F.elu: Curvature.rising_then_falling,
    F.celu: Curvature.rising_then_falling,
    F.selu: Curvature.rising_then_falling,
}

# Operators, and methods of tensors that are not in place, which come down to operators.
_OPERATORS = (
    "__add__", "__radd__", "__sub__", "__rsub__", "__neg__", "__mul__", "__rmul__", "__truediv__",
)  # fmt: skip
_TENSOR_METHODS = {
    **{name: getattr(Tensor, name) for name in METHODS if not name.endswith("_")},
    "__getitem__": Tensor.__getitem__,
    "view": Tensor.reshape,
}


def _method(function: Operation, rule: Callable[..., Interval]) -> Callable[..., Traced]:
    def method(self: Traced, *args: Any, **keys: Any) -> Traced:
        return _recorded(function, rule, (self, *args), keys)

    return method


for _name in _OPERATORS:
    setattr(Traced, _name, _method(getattr(Tensor, _name), getattr(Interval, _name)))
for _name, _function in _TENSOR_METHODS.items():
    setattr(Traced, _name, _method(_function, METHODS[_name]))


def _index_select(x: Interval, dim: int, index: Tensor) -> Interval:
    return Interval(x.centre.index_select(dim, index), x.radius.index_select(dim, index))


# For windows, and for networks that move elements by it.
Traced.index_select = _method(Tensor.index_select, _index_select)  # type: ignore[attr-defined]
