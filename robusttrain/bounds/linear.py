"""Linear lower bounds, propagated backward (CROWN), with optimised slopes (alpha-CROWN)."""

import math
import time
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robusttrain.bounds.graph import Activation, Affine, Graph, Node
from robusttrain.bounds.inputs import InputSet
from robusttrain.bounds.intervals import Interval
from robusttrain.bounds.relaxations import Lines, relu_lines, relu_slopes
from robusttrain.runtime.free_memory import available
from robusttrain.threat import Threat
from robusttrain.threat.balls import in_float64

# Rounding errors are taken to be below this many units in the last place of the sum of the absolute
# values of all terms of a bound.
UNITS = 256

# Of the free memory, what a pass may take, and at most so many bytes.
SHARE, MOST_BYTES = 0.25, 2**31

# Tensors of the size of the widest result that are alive at once in a pass; and, of all results,
# those that a trace keeps, and those that a pass keeps for its gradient.
ALIVE, TRACE, KEPT = 6, 6, 5

# Adam's learning rate for slopes and multipliers, and its decay in each step (Xu et al. 2021).
RATE, DECAY = 0.1, 0.98

Slopes = Mapping[Activation, Tensor]


class Bound(NamedTuple):
    """Linear lower bounds <coefficients, z> + constant over images z in S(x).

    `value` (S, N) is their least value, `terms` (S, N) the sum of the absolute values of what it
    was summed from, `coefficients` (S, N, C, H, W), and `constant` (S, N).
    """

    value: Tensor
    terms: Tensor
    coefficients: Tensor
    constant: Tensor

    @property
    def rounding(self) -> Tensor:
        """What may be wrong with `value` by rounding, (S, N)."""
        return UNITS * torch.finfo(self.value.dtype).eps * (1 + self.terms)


@dataclass
class Backward:
    """Backward passes through `graph` from one node to the images of `inputs`.

    Parameters
    ----------
    slopes
        The slopes of the lines below ReLUs, from 0 to 1, (S or 1, N, ...); where there is none, it
        is 0 or 1, by `relu_slopes`.
    multipliers
        A term added to the coefficients of the argument of an activation, (S or 1, N, ...).
    """

    graph: Graph
    inputs: InputSet
    slopes: Slopes = field(default_factory=dict)
    multipliers: Slopes = field(default_factory=dict)
    # The coefficients of the activations in the last pass.
    reached: dict[Activation, Tensor] = field(default_factory=dict)

    def __call__(self, node: Node, coefficients: Tensor) -> Bound:
        """Lower bounds of <coefficients, result of node>, with coefficients (S, N, ...)."""
        waiting = {node: coefficients}
        constant = terms = torch.zeros_like(coefficients.flatten(2)[:, :, 0])
        nodes = self.graph.nodes
        for current in reversed(nodes[: nodes.index(node) + 1]):
            if current is self.graph.input or current not in waiting:
                continue
            a = waiting.pop(current)
            parts, sums = self._through(current, a)
            for part in sums:
                constant = constant + part.flatten(2).sum(2)
                terms = terms + part.detach().flatten(2).abs().sum(2)
            for parent, part in zip(current.parents, parts, strict=True):
                waiting[parent] = waiting[parent] + part if parent in waiting else part
        none = coefficients.new_zeros(len(coefficients), *self.inputs.x.shape)
        slope = waiting.get(self.graph.input, none)
        terms = terms + slope.detach().flatten(2).abs().sum(2)
        return Bound(constant + self.inputs.minimum(slope), terms, slope, constant)

    def _through(self, node: Node, a: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """Coefficients of the operands, and terms that do not depend on them."""
        if isinstance(node, Affine):
            return node.pull(a), [a * node.offset] if node.shifts else []
        assert isinstance(node, Activation)
        self.reached[node] = a.detach()
        lines = self.lines(node)
        rise, fall = a.clamp_min(0), a.clamp_max(0)
        result = rise * lines.lower_slope + fall * lines.upper_slope
        if node in self.multipliers:
            result = result + self.multipliers[node]
        rest = fall * lines.upper_intercept
        return (result,), [rest if node.is_relu else rest + rise * lines.lower_intercept]

    def lines(self, node: Activation) -> Lines:
        """The lines below and above an activation."""
        lower, upper = node.before.lower, node.before.upper
        if node.shape is not None:
            return node.shape.lines(lower, upper)
        slopes = self.slopes.get(node)
        return relu_lines(lower, upper, relu_slopes(lower, upper) if slopes is None else slopes)


def margins(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    optimise: int = 0,
    refine: bool = True,
    seconds: float = math.inf,
) -> Tensor:
    """Lower bounds (N, K) of f_y(z) - f_k(z) over all z in S(x); inf for k = y.

    An image whose bounds are all above 0 keeps its label in the whole set: it is proven.

    The bounds are the larger of those of intervals (`Interval.margins`) and of linear functions
    that are propagated from the margins to the images (CROWN, Zhang et al. 2018, "Efficient neural
    network robustness certification with general activation functions"). Bounds of hidden layers
    are those of intervals, intersected with CROWN's if `refine`.

    What is claimed: the bounds hold for the network in exact arithmetic with these weights. From
    each bound, `UNITS` units in the last place of the sum of the absolute values of its terms were
    subtracted, which is more than rounding is seen to do, but is not a proof about rounding. Where
    that decides the sign of an image's smallest bound in float32, the image is computed in float64,
    with a copy of the model.

    Parameters
    ----------
    model
        A network without noise, which is run in eval mode.
    x, y
        Images (N, C, H, W) in [0, 1], in float32 or float64 as the model, and labels (N,).
    threat
        The ball, which is intersected with the box [0, 1].
    optimise
        Steps of Adam on the slopes below ReLUs, an own slope for each margin (alpha-CROWN, Xu et
        al. 2021, "Fast and complete"), 0 or more. The best bound of all steps is kept, or the first
        one above 0. Slopes for the bounds of hidden layers are not optimised.
    refine
        Whether hidden layers get linear bounds, too: a pass for each element of them whose
        activation is not linear within its bounds. In l2 and l1 this also replaces the box around
        the ball by the ball, for the first layer.
    seconds
        The time after which hidden layers get no further linear bounds. Bounds then depend on the
        speed of the machine.

    Raises
    ------
    InputError
        If an operation of the network has no bounds.
    MemoryError
        If a pass for one function and one image does not fit into the memory; see `bytes_of_pass`.
    """
    until = time.perf_counter() + seconds if refine else -math.inf
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        bounds, rounding = _margins(model, x, y, threat, optimise, until)
        least, at = bounds.min(1)
        close = least.abs() <= rounding.gather(1, at[:, None]).squeeze(1)
        if x.dtype != torch.float64 and bool(close.any()):
            again = in_float64(x[close])
            labels = y[close].to(again.device)
            exact, rest = _margins(float64_copy(model), again, labels, threat, optimise, until)
            bounds[close] = (exact - rest).to(bounds)
            rounding[close] = 0
    return bounds - rounding


def bytes_of_pass(graph: Graph, itemsize: int, *, differentiable: bool = False) -> int:
    """Bytes that a backward pass takes for each function of each image, at most."""
    kept = KEPT * sum(graph.sizes) if differentiable else 0
    return itemsize * (ALIVE * max(graph.sizes) + kept)


def bytes_of_trace(graph: Graph, itemsize: int) -> int:
    """Bytes that the graph itself takes for each image, about."""
    return itemsize * TRACE * sum(graph.sizes)


def budget(device: torch.device) -> float:
    """Bytes that bounds may take on `device`."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available()
    return min(MOST_BYTES, SHARE * free)


def refined(graph: Graph, inputs: InputSet, functions: int, until: float = math.inf) -> None:
    """Improve the bounds in `graph` by linear bounds of all arguments of activations, in order.

    Parameters
    ----------
    functions
        The number of functions of each image that fit into one pass.
    until
        The time, by `time.perf_counter`, from which on intervals have to do.
    """
    done: set[Node] = set()
    for node in graph.nodes[1:]:
        node.tighten(node.rule())
        if isinstance(node, Activation) and node.parents[0] not in done:
            done.add(node.parents[0])
            _refine(graph, inputs, node, functions, until)
            node.tighten(node.rule())


def _refine(graph: Graph, inputs: InputSet, node: Activation, functions: int, until: float) -> None:
    """Improve the bounds of the argument of `node` where they matter."""
    before, unstable = node.parents[0], node.unstable.flatten(1)
    most = int(unstable.sum(1).max())
    if most == 0:
        return
    # Unstable elements first; images with fewer of them than others get some that do not matter.
    chosen = unstable.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    low, high = before.bounds.lower.flatten(1), before.bounds.upper.flatten(1)
    bounding = Backward(graph, inputs)
    for part in torch.split(chosen, functions, dim=1):
        if time.perf_counter() > until:
            break
        rows = torch.zeros(*part.T.shape, before.size, dtype=low.dtype, device=low.device)
        rows.scatter_(2, part.T[:, :, None], 1.0)
        rows = rows.view(*part.T.shape, *before.bounds.shape[1:])
        least, most_negative = bounding(before, rows).value, bounding(before, -rows).value
        low = low.scatter(1, part, torch.fmax(low.gather(1, part), least.T))
        high = high.scatter(1, part, torch.fmin(high.gather(1, part), -most_negative.T))
    shape = before.bounds.shape
    before.tighten(Interval.between(low.view(shape), high.view(shape)))


@dataclass
class Ascent:
    """Slopes and multipliers that raise lower bounds, by Adam; the best bounds are kept.

    Parameters
    ----------
    graph, inputs
        As in `Backward`.
    signs
        For activations that are split: 1 where the argument is known to be 0 or more, -1 where it
        is known to be 0 or less, and 0 elsewhere, (1, N, ...). Each has a multiplier beta >= 0, and
        beta times a term that is known to be 0 or less is added to the function (beta-CROWN, Wang
        et al. 2021).
    alphas, betas
        Where the search starts, (S, N, ...); changed in place.
    """

    graph: Graph
    inputs: InputSet
    signs: dict[Activation, Tensor] = field(default_factory=dict)
    alphas: dict[Activation, Tensor] = field(default_factory=dict)
    betas: dict[Activation, Tensor] = field(default_factory=dict)

    def __call__(self, node: Node, coefficients: Tensor, steps: int) -> tuple[Bound, Backward]:
        """The best bounds after `steps` steps, and the last pass, with its coefficients."""
        self._start(len(coefficients))
        free = [*self.alphas.values(), *self.betas.values()]
        for each in free:
            each.requires_grad_(steps > 0)
        optimiser = torch.optim.Adam(free, lr=RATE) if free and steps else None
        last = self.backward()
        best = None
        for step in range(steps + 1):
            with torch.set_grad_enabled(step < steps and optimiser is not None):
                last = self.backward()
                bound = last(node, coefficients)
            found = Bound(*(part.detach() for part in bound))
            best = found if best is None else _better(best, found)
            if optimiser is None or step == steps or bool((best.value > best.rounding).all()):
                break
            self._step(optimiser, free, bound.value)
        assert best is not None
        for each in free:
            each.requires_grad_(False)
        return best, last

    def backward(self) -> Backward:
        """The pass with the current slopes and multipliers."""
        terms = {node: -self.signs[node] * beta for node, beta in self.betas.items()}
        return Backward(self.graph, self.inputs, self.alphas, terms)

    def _start(self, functions: int) -> None:
        for node in self.graph.relus:
            lower, upper = node.before.lower, node.before.upper
            if node not in self.alphas and bool(node.unstable.any()):
                slopes = relu_slopes(lower, upper)
                self.alphas[node] = slopes.expand(functions, *slopes.shape).clone()
            if node not in self.betas and node in self.signs:
                self.betas[node] = lower.new_zeros(functions, *lower.shape)

    def _step(self, optimiser: torch.optim.Adam, free: list[Tensor], value: Tensor) -> None:
        down = -torch.ones_like(value)
        gradients = torch.autograd.grad(value, free, down, allow_unused=True)
        for each, gradient in zip(free, gradients, strict=True):
            each.grad = gradient
        optimiser.step()
        with torch.no_grad():
            for alpha in self.alphas.values():
                alpha.clamp_(0, 1)
            for beta in self.betas.values():
                beta.clamp_(min=0)
        for group in optimiser.param_groups:
            group["lr"] *= DECAY


def _better(one: Bound, other: Bound) -> Bound:
    """The larger value of each function; the rest is that of `other`.

    A value that proves something stays, as a search does that ends there: bounds of a function must
    not depend on how long others take.
    """
    higher = other.value.nan_to_num(-torch.inf) > one.value.nan_to_num(-torch.inf)
    better = higher & ~(one.value > one.rounding)
    value = torch.where(better, other.value, one.value)
    return Bound(value, torch.where(better, other.terms, one.terms), *other[2:])


def differences(y: Tensor, others: Tensor, classes: int) -> Tensor:
    """Coefficients (S, N, K) of f_y - f_k, for labels y (N,) and classes k (N, S)."""
    rows = torch.zeros(*others.T.shape, classes, device=y.device)
    rows.scatter_(2, others.T[:, :, None], -1.0)
    return rows.scatter_(2, y[None, :, None].expand(len(rows), -1, 1), 1.0)


def other_classes(y: Tensor, classes: int) -> Tensor:
    """All classes but y (N,), in their order, (N, K - 1)."""
    all_of_them = torch.arange(classes - 1, device=y.device).expand(len(y), -1)
    return all_of_them + (all_of_them >= y[:, None])


def _margins(
    model: nn.Module, x: Tensor, y: Tensor, threat: Threat, optimise: int, until: float
) -> tuple[Tensor, Tensor]:
    """Bounds (N, K), and what may be wrong with them by rounding."""
    first = Graph(model, InputSet(x[:1], threat).box)
    itemsize = x.element_size()
    most = budget(x.device)
    per_function = bytes_of_pass(first, itemsize, differentiable=optimise > 0)
    cells = int(most / 2 / per_function)
    images = int(most / 2 / bytes_of_trace(first, itemsize))
    if min(cells, images) < 1:
        needed = 2 * max(per_function, bytes_of_trace(first, itemsize))
        raise MemoryError(f"linear bounds of one image take {needed:,} bytes, of {int(most):,}")
    classes = first.output.size
    del first
    size = min(images, max(1, cells // (classes - 1)))
    parts = [
        _of_batch(model, *batch, threat, optimise, until, max(1, cells // len(batch[0])))
        for batch in _batches(x, y, size)
    ]
    bounds, rounding = (torch.cat(part) for part in zip(*parts, strict=True))
    return bounds, rounding


def _batches(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(x, size), torch.split(y, size), strict=True)


def _of_batch(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    optimise: int,
    until: float,
    functions: int,
) -> tuple[Tensor, Tensor]:
    inputs = InputSet(x, threat)
    graph = Graph(model, inputs.box)
    refined(graph, inputs, functions, until)
    others = other_classes(y, graph.output.size)
    rows = differences(y, others, graph.output.size).to(x)
    found = [
        Ascent(graph, inputs)(graph.output, part, optimise)[0]
        for part in torch.split(rows, functions)
    ]
    values, rounding = (
        torch.cat([getattr(part, name) for part in found]).T for name in ("value", "rounding")
    )
    # Not the intersected bounds, which do not belong to the last layer alone.
    ends = graph.output.rule()
    by_intervals = -ends.margins(y).gather(1, others)
    largest = torch.maximum(ends.lower.abs(), ends.upper.abs()).amax(1, keepdim=True)
    instead = ~(values >= by_intervals)
    values = torch.where(instead, by_intervals, values).nan_to_num(-torch.inf)
    of_intervals = UNITS * torch.finfo(x.dtype).eps * (1 + largest)
    rounding = torch.where(instead, of_intervals, rounding).nan_to_num(torch.inf)
    bounds = torch.full((len(x), graph.output.size), torch.inf, dtype=x.dtype, device=x.device)
    none = torch.zeros_like(bounds)
    return bounds.scatter(1, others, values), none.scatter(1, others, rounding)


def float64_copy(model: nn.Module) -> nn.Module:
    """A copy of the model in float64, on the CPU if its device has none (MPS)."""
    copy = deepcopy(model)
    parameter = next(iter(copy.parameters()), None)
    on_mps = parameter is not None and parameter.device.type == "mps"
    return (copy.cpu() if on_mps else copy).double()
