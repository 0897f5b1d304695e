"""Branch and bound on ReLUs: prove an image, or find its counterexample."""

import math
import time
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robusttrain.bounds.graph import Graph, Node
from robusttrain.bounds.inputs import InputSet
from robusttrain.bounds.intervals import Interval
from robusttrain.bounds.leaves import Leaf
from robusttrain.bounds.linear import (
    Ascent,
    Backward,
    budget,
    bytes_of_pass,
    bytes_of_trace,
    differences,
    float64_copy,
    other_classes,
    refined,
)
from robusttrain.bounds.relaxations import relu_slopes
from robusttrain.models.modes import modes_restored
from robusttrain.threat import Threat
from robusttrain.threat.balls import ball, in_float64

# Steps of Adam for all regions, and of the attack from the points where their bounds are least.
BOUNDING_STEPS, ATTACK_STEPS = 10, 5

# Regions that are bounded at once, at most.
MOST_REGIONS = 64

# Steps of Adam at the start; random starts of the first attack.
ROOT_STEPS, STARTS = 20, 8

# Numbers that a region stores for each argument of a ReLU.
STORED = 5

# A step of the attack, as a share of the radius.
STEP = 0.25


class Status(StrEnum):
    """What is known of an image."""

    proven = "proven"
    counterexample = "counterexample"
    undecided = "undecided"


class Reason(Enum):
    """Why an image is undecided."""

    none = ""
    time = "time"
    memory = "memory"
    incomplete = "a region in which all ReLUs are linear was neither proven nor broken"


class Decision(NamedTuple):
    """The answer for one image.

    Attributes
    ----------
    status, reason
        What was found out, and why nothing was.
    point
        A counterexample (1, C, H, W) in S(x), in the dtype of the image, or None.
    bound
        The least lower bound of the margins of all regions, above 0 if proven; NaN with a
        counterexample.
    regions
        The number of regions that were bounded.
    seconds
        The time that it took.
    """

    status: Status
    reason: Reason
    point: Tensor | None
    bound: float
    regions: int
    seconds: float


@dataclass(frozen=True)
class _Region:
    """A part of S(x) for one margin: the signs of some arguments of ReLUs are given.

    `bounds` has the bounds of the argument of each ReLU, and `signs` the given signs. The search
    for slopes and multipliers starts at `alphas` and `betas`. All are (1, ...), in the order of the
    ReLUs. `split` is the ReLU and the element to split next, None if there is none.
    """

    other: int
    bound: float
    bounds: tuple[tuple[Tensor, Tensor], ...]
    signs: tuple[Tensor, ...]
    alphas: tuple[Tensor, ...]
    betas: tuple[Tensor, ...]
    split: tuple[int, int] | None

    def halves(self) -> "list[_Region]":
        """The two regions in which the argument that is split is at least, and at most 0."""
        assert self.split is not None
        at, element = self.split
        return [self._half(at, element, sign) for sign in (1, -1)]

    def _half(self, at: int, element: int, sign: int) -> "_Region":
        lower, upper = (part.clone() for part in self.bounds[at])
        (lower if sign > 0 else upper).view(-1)[element] = 0
        signs = self.signs[at].clone()
        signs.view(-1)[element] = sign
        return _Region(
            self.other,
            self.bound,
            _replaced(self.bounds, at, (lower, upper)),
            _replaced(self.signs, at, signs),
            self.alphas,
            self.betas,
            None,
        )


def _replaced(parts: tuple, at: int, part: object) -> tuple:  # type: ignore[type-arg]
    return (*parts[:at], part, *parts[at + 1 :])


def decide(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    seconds: float,
    generator: torch.Generator,
) -> Decision:
    """Whether the label y of one image is that of all points of S(x).

    Branch and bound (Bunel et al. 2018): a region whose bound does not prove it is split at a ReLU
    whose argument may have both signs. Regions are bounded by linear bounds with a multiplier for
    each given sign (beta-CROWN, Wang et al. 2021). The region with the least bound is next. It is
    split at the ReLU that may cost its bound most (`_scores`). A few steps of an attack start from
    the point of each region where its linear bound is least. A region in which all ReLUs have a
    sign is decided by a linear program, in float64.

    With ReLUs, LeakyReLUs, clamps and max pooling as the only activations, and without a limit of
    time, all images are decided in linf and l1 unless a margin is 0 up to rounding. In l2 the
    program is solved by L-BFGS-B, which may miss the last digits. Other activations are bounded,
    and never split.

    What is claimed of a proof is what `linear.margins` claims. A counterexample is a point of S(x),
    as `threat.balls` projects it, at which the model computes a margin below 0, or NaN.

    Parameters
    ----------
    model
        A network without noise, which is run in eval mode.
    x, y
        One image (1, C, H, W) in [0, 1] and its label (1,).
    threat
        The ball.
    seconds
        The limit of time, above 0. A step that has begun is completed.
    generator
        Draws the random starts of the first attack, on the device of x.

    Raises
    ------
    InputError
        If an operation of the network has no bounds.
    MemoryError
        If the bounds of a single region do not fit into the memory.
    """
    precise = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with torch.no_grad(), precise, modes_restored(model):
        return _Search(model.eval(), x, y, threat, seconds, generator).run()


class _Search:
    """A search through the regions of one image."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        seconds: float,
        generator: torch.Generator,
    ) -> None:
        self.model, self.x, self.y, self.threat = model, x, y, threat
        self.generator = generator
        self.started = time.perf_counter()
        self.end = self.started + seconds
        self.graphs: dict[int, Graph] = {}
        self.exact: Graph | None = None
        self.regions, self.incomplete, self.least = 0, False, math.inf
        self.point: Tensor | None = None

    def run(self) -> Decision:
        """The decision."""
        if self._broken(self._random_points()):
            return self._decision(Status.counterexample)
        waiting = self._roots()
        while waiting and self.point is None:
            if time.perf_counter() > self.end:
                return self._undecided(Reason.time, waiting)
            if len(waiting) * self.stored > budget(self.x.device):
                return self._undecided(Reason.memory, waiting)
            waiting.sort(key=lambda region: region.bound)
            most = max(1, self.batch // 2)
            halves = [half for region in waiting[:most] for half in region.halves()]
            waiting = waiting[most:] + self._open(halves, BOUNDING_STEPS)
        if self.point is not None:
            return self._decision(Status.counterexample)
        if self.incomplete:
            return self._undecided(Reason.incomplete, [])
        return self._decision(Status.proven)

    def _undecided(self, reason: Reason, waiting: list[_Region]) -> Decision:
        self.least = min([self.least, *(region.bound for region in waiting)])
        return self._decision(Status.undecided, reason)

    def _decision(self, status: Status, reason: Reason = Reason.none) -> Decision:
        seconds = time.perf_counter() - self.started
        bound = self.least if self.point is None else math.nan
        return Decision(status, reason, self.point, bound, self.regions, seconds)

    def _roots(self) -> list[_Region]:
        """S(x) itself for each other class, unless it is proven."""
        inputs = InputSet(self.x, self.threat)
        graph = Graph(self.model, inputs.box)
        itemsize = self.x.element_size()
        region = bytes_of_pass(graph, itemsize, differentiable=True)
        region += bytes_of_trace(graph, itemsize)
        self.batch = min(MOST_REGIONS, int(budget(self.x.device) / 2 / region))
        if self.batch < 1:
            raise MemoryError(f"linear bounds of one region take {region:,} bytes")
        refined(graph, inputs, self.batch, self.end)
        none = tuple(torch.zeros_like(node.before.centre) for node in graph.relus)
        bounds = tuple((node.before.lower, node.before.upper) for node in graph.relus)
        slopes = tuple(relu_slopes(*pair) for pair in bounds)
        self.stored = sum(STORED * part.numel() for part in none) * itemsize
        others = other_classes(self.y, graph.output.size)[0].tolist()
        roots = [_Region(other, -math.inf, bounds, none, slopes, none, None) for other in others]
        return self._open(roots, ROOT_STEPS)

    def _open(self, regions: list[_Region], steps: int) -> list[_Region]:
        """What has to be split of these regions, with new bounds."""
        found: list[_Region] = []
        for start in range(0, len(regions), self.batch):
            if self.point is None:
                found += self._bounded(regions[start : start + self.batch], steps)
        return [region for region in found if not self._is_leaf(region)]

    def _bounded(self, regions: list[_Region], steps: int) -> list[_Region]:
        """These regions with new bounds, without those that are proven."""
        self.regions += len(regions)
        # Graphs are kept for powers of two; the last region fills the rest.
        size = 1 << (len(regions) - 1).bit_length()
        batch = regions + regions[-1:] * (size - len(regions))
        inputs = InputSet(self.x.expand(size, *self.x.shape[1:]), self.threat)
        graph = self._graph(inputs, size)
        empty = graph.restrict(_intervals(graph, batch))
        ascent = _ascent(graph, inputs, batch)
        others = torch.tensor([[region.other] for region in batch], device=self.y.device)
        rows = differences(self.y.expand(size), others, graph.output.size).to(self.x)
        bound, last = ascent(graph.output, rows, steps)
        values = torch.where(empty, torch.inf, bound.value[0]).nan_to_num(-torch.inf, torch.inf)
        held = values > bound.rounding[0]
        left = [row for row in range(len(regions)) if not held[row]]
        self.least = min([self.least, *values[: len(regions)][held[: len(regions)]].tolist()])
        if not left or self._broken(inputs.minimiser(bound.coefficients)[0][left]):
            return []
        scores = _scores(last)
        return [
            _renewed(regions[row], row, float(values[row]), graph, ascent, scores) for row in left
        ]

    def _graph(self, inputs: InputSet, size: int) -> Graph:
        if size not in self.graphs:
            self.graphs[size] = Graph(self.model, inputs.box)
        return self.graphs[size]

    def _is_leaf(self, region: _Region) -> bool:
        """Whether nothing is left to split; then the region is decided, or noted as undecided."""
        if region.split is not None or self.point is not None:
            return region.split is None
        bound, rounding, point = self._solved(region)
        proven = bound > rounding
        if not proven and not self._broken(point.to(self.x)):
            self.incomplete = True
        self.least = min(self.least, bound)
        return True

    def _solved(self, region: _Region) -> tuple[float, float, Tensor]:
        """The least margin in a leaf, its rounding error, and a point near it, in float64."""
        inputs = InputSet(in_float64(self.x), self.threat)
        if self.exact is None:
            self.exact = Graph(float64_copy(self.model), inputs.box)
        graph = self.exact
        graph.restrict(_intervals(graph, [region]))
        backward = Backward(graph, inputs)
        other = torch.tensor([[region.other]])
        margin = differences(self.y.cpu(), other, graph.output.size).to(inputs.x)
        bound = backward(graph.output, margin)
        rows, heights = [], []
        for node, signs in zip(graph.relus, region.signs, strict=True):
            given = _one_hot(signs.to(inputs.x))
            if len(given):
                condition = backward(node.parents[0], given)
                rows.append(condition.coefficients.flatten(1))
                heights.append(condition.constant[:, 0])
        slope = bound.coefficients.flatten()
        leaf = Leaf(
            inputs,
            slope,
            float(bound.constant),
            torch.cat([slope.new_zeros(0, len(slope)), *rows]),
            torch.cat([slope.new_zeros(0), *heights]),
        )
        least, point = leaf.solve()
        if graph.smooth:
            # Lines beside a curve, which are no function of the network.
            least = float(bound.value)
        return least, float(bound.rounding), point

    def _random_points(self) -> Tensor:
        start = self.x.expand(STARTS, *self.x.shape[1:])
        return torch.cat([self.x, ball(self.threat).random_start(start, self.generator)])

    def _broken(self, points: Tensor) -> bool:
        """Whether a short attack from these points finds a counterexample, which is kept."""
        area = ball(self.threat)
        x = self.x.expand(len(points), *self.x.shape[1:])
        z = area.project(torch.where(points.isfinite(), points, x), x)
        for step in range(ATTACK_STEPS + 1):
            with torch.enable_grad():
                leaf = z.clone().requires_grad_()
                logits = self.model(leaf)
                own = logits[:, self.y[0]]
                worst = logits.index_fill(1, self.y, -torch.inf).amax(1) - own
            wrong = ~(worst <= 0)
            if bool(wrong.any()):
                self.point = z[wrong][:1].clone()
                return True
            if step < ATTACK_STEPS:
                (gradient,) = torch.autograd.grad(worst, leaf, torch.ones_like(worst))
                finite = torch.where(gradient.isfinite(), gradient, 0)
                z = area.project(z + STEP * area.eps * area.ascent(finite, z), x)
        return False


def _intervals(graph: Graph, regions: list[_Region]) -> dict[Node, list[Interval]]:
    """The bounds of the arguments of all ReLUs in a batch of regions."""
    found: dict[Node, list[Interval]] = {}
    for at, node in enumerate(graph.relus):
        pairs = [region.bounds[at] for region in regions]
        lower, upper = (
            torch.cat(parts).to(graph.input.bounds.centre) for parts in zip(*pairs, strict=True)
        )
        found.setdefault(node.parents[0], []).append(Interval.between(lower, upper))
    return found


def _ascent(graph: Graph, inputs: InputSet, regions: list[_Region]) -> Ascent:
    """The search for slopes and multipliers, from where the regions' own have ended."""
    ascent = Ascent(graph, inputs)
    for at, node in enumerate(graph.relus):
        signs = torch.cat([region.signs[at] for region in regions])[None]
        if bool(node.unstable.any()):
            ascent.alphas[node] = torch.cat([region.alphas[at] for region in regions])[None]
        if bool(signs.any()):
            ascent.signs[node] = signs
            ascent.betas[node] = torch.cat([region.betas[at] for region in regions])[None]
    return ascent


def _renewed(
    region: _Region, row: int, bound: float, graph: Graph, ascent: Ascent, scores: list[Tensor]
) -> _Region:
    """The region with what its last bounding has found, in row `row` of the batch."""
    own = slice(row, row + 1)
    relus = graph.relus
    bounds = tuple((node.before.lower[own], node.before.upper[own]) for node in relus)
    alphas = tuple(
        ascent.alphas[node][0, own].detach() if node in ascent.alphas else before
        for node, before in zip(relus, region.alphas, strict=True)
    )
    betas = tuple(
        ascent.betas[node][0, own].detach() if node in ascent.betas else before
        for node, before in zip(relus, region.betas, strict=True)
    )
    # Copies: views would keep the whole batch alive.
    bounds = tuple((lower.clone(), upper.clone()) for lower, upper in bounds)
    alphas, betas = (tuple(part.clone() for part in parts) for parts in (alphas, betas))
    split = _split([score[row] for score in scores])
    return _Region(
        region.other, max(bound, region.bound), bounds, region.signs, alphas, betas, split
    )


def _scores(last: Backward) -> list[Tensor]:
    """How much the relaxation of each ReLU may cost the bound, (N, D); -inf where it is exact.

    That is the coefficient of the ReLU times the largest distance of ReLU and the line in its
    place: the chord if the coefficient is negative, and else the line through 0 below it.
    """
    found = []
    for node in last.graph.relus:
        a, lines = last.reached[node][0], last.lines(node)
        lower, upper = node.before.lower, node.before.upper
        slope = lines.lower_slope.reshape(lower.shape)
        below = torch.maximum((1 - slope) * upper, -slope * lower)
        cost = a.clamp_min(0) * below - a.clamp_max(0) * lines.upper_intercept
        found.append(torch.where(node.unstable, cost, -torch.inf).flatten(1))
    return found


def _split(scores: list[Tensor]) -> tuple[int, int] | None:
    """The ReLU and its element with the largest score; None if all ReLUs are exact."""
    best = [float(score.max()) for score in scores]
    if not best or max(best) == -math.inf:
        return None
    at = best.index(max(best))
    return at, int(scores[at].argmax())


def _one_hot(signs: Tensor) -> Tensor:
    """A function of each element with a sign, times that sign: (R, *shape of signs)."""
    flat = signs.flatten()
    given = flat.nonzero()
    rows = flat.new_zeros(len(given), len(flat))
    return rows.scatter_(1, given, flat[given]).view(len(given), *signs.shape)
