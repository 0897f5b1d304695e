"""A decision-based attack, which asks for labels only (Brendel et al. 2018)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle

import torch
from torch import Tensor

from robusttrain import ranges
from robusttrain.attacks import Traits
from robusttrain.attacks.attack_loss import AttackLoss
from robusttrain.attacks.ball_attack import BallAttack
from robusttrain.attacks.search_state import BestPoints, remaining_indices
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import TINY, Ball, ball, per_image

# Queries that halve the way to the boundary, and the last ones of a search.
BISECTIONS = 10

# Random points that are tried until one has another label.
FIRST_TRIES = 20

# Queries for the first normal of the boundary; the n-th takes sqrt(n) times as many.
NORMAL_QUERIES = 50

# How often a step that crosses the boundary again is halved.
HALVINGS = 6

Way = Callable[[Tensor, Tensor], Tensor]
"""(which of the images, lengths t (n,)) -> points, (n, C, H, W)."""


@dataclass
class DecisionBased(BallAttack):
    """Walks along the decision boundary towards the image, and asks for labels only.

    Neither gradients nor logits are used, so that nothing a model does to them hides its weakness.

    In linf this is RayS (Chen and Gu 2020): a direction of signs, of which blocks of pixels change
    sign: all, then halves, quarters and so on. A change is kept if the point at the present
    distance is misclassified, and the distance is bisected. The first search starts with equal
    signs, and others with Square's stripes.

    In l2 and l1 the normal w of the boundary at the nearest point found is estimated from the
    labels of Gaussian points around it (Chen, Jordan and Wainwright 2020, equation 16). The next
    point is the first misclassified one on the shortest ways to planes with this normal (GeoDA,
    Rahmati et al. 2020, equation 13, within the box). Where it is not nearer, a step along w and a
    bisection towards the image follow (HopSkipJump, Algorithm 2).

    An image is done with once it is fooled within the ball. An image for which no random point has
    another label stays as it is. Forward passes only: one at x, and one a query. All images of a
    call get the same draws.

    Parameters
    ----------
    queries
        Most queries an image in each search, 50 or more.
    restarts
        Searches, 1 or more, each from another start.
    """

    queries: int = 1000
    restarts: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.at_least(50, queries=self.queries)
        ranges.at_least(1, restarts=self.restarts)

    @property
    def traits(self) -> Traits:
        """What kind of an attack it is."""
        return replace(super().traits, black_box=True, walks_boundary=True)

    def search(self, surrogate: AttackLoss, x: Tensor, generator: torch.Generator) -> Tensor:
        """The nearest point found that fools the model, cut to the ball."""
        best = BestPoints(x)
        every = torch.arange(len(x), device=x.device)
        _, logits = surrogate.score(x)
        # Worse than every point of another label, whose value is its distance below 0.
        best.offer(every, x, torch.full_like(best.value, -torch.inf), surrogate.succeeded(logits))
        run = self._by_rays if self.norm is Norm.linf else self._by_normals
        # A generator for each search, since how long the one before it took depends on the batch.
        for number, draws in enumerate(_generators(self.restarts, generator)):
            rows = best.remaining
            if len(rows) == 0:
                break
            walk = _Walk(surrogate.take(rows), x[rows], ball(Threat(self.norm, 1)))
            run(walk, number, draws)
            found = walk.distance.isfinite().nonzero().squeeze(1)
            distance = walk.distance[found]
            best.offer(rows[found], walk.nearest[found], -distance, distance <= self.eps)
        return self.ball.project(best.x_adv, x)

    def _by_rays(self, walk: "_Walk", number: int, generator: torch.Generator) -> None:
        signs = torch.ones_like(walk.x)
        if number > 0:
            signs *= 2 * _stripes(walk.x[:1], generator) - 1
        for block in _blocks(walk.x):
            rows = self._going_on(walk, 1 + BISECTIONS)
            if len(rows) == 0:
                return
            new = torch.where(block, -signs[rows], signs[rows])
            nearer = walk.bisect(rows, new, walk.distance[rows].clamp_max(1))
            signs[rows[nearer]] = new[nearer]

    def _by_normals(self, walk: "_Walk", _: int, generator: torch.Generator) -> None:
        walk.start(generator)
        for count in range(1, self.queries):
            normals = round(min(NORMAL_QUERIES, self.queries // 10) * math.sqrt(count))
            rows = self._going_on(walk, normals + 2 * (1 + BISECTIONS) + HALVINGS)
            # Without a start there is no boundary to follow.
            rows = rows[walk.distance[rows].isfinite()]
            if len(rows) == 0:
                return
            normal = walk.normal(rows, normals, generator)
            behind = remaining_indices(walk.to_planes(rows, normal))
            step = walk.distance[rows[behind]] / math.sqrt(count)
            walk.hop(rows[behind], walk.ball.steepest(normal[behind]), step)

    def _going_on(self, walk: "_Walk", queries: int) -> Tensor:
        """Images that are not fooled within the ball, and have so many queries left."""
        left = walk.asked + queries <= self.queries
        return ((walk.distance > self.eps) & left).nonzero().squeeze(1)


class _Walk:
    """The nearest misclassified point of each image, its distance, and the queries so far."""

    def __init__(self, surrogate: AttackLoss, x: Tensor, ball: Ball) -> None:
        self.surrogate, self.x, self.ball = surrogate, x, ball
        self.nearest = x.clone()
        self.distance = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        self.asked = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def fools(self, rows: Tensor, points: Tensor) -> Tensor:
        """Whether the model misclassifies each of the points, by a query each."""
        self.asked[rows] += 1
        surrogate = self.surrogate.take(rows)
        _, logits = surrogate.score(points)
        return surrogate.succeeded(logits)

    def start(self, generator: torch.Generator) -> None:
        """Try random points until each image has a misclassified one, and bisect towards it."""
        kinds = cycle((_uniform, _stripes))
        for random, _ in zip(kinds, range(FIRST_TRIES), strict=False):
            end = random(self.x[:1], generator)
            rows = self.distance.isinf().nonzero().squeeze(1)
            self.bisect(rows, end - self.x[rows], torch.ones_like(self.distance[rows]))

    def bisect(self, rows: Tensor, direction: Tensor, most: Tensor) -> Tensor:
        """`bisect_way` along x + t `direction`, cut to the box."""

        def way(chosen: Tensor, t: Tensor) -> Tensor:
            x = self.x[rows[chosen]]
            return (x + per_image(t, x) * direction[chosen]).clamp_(0, 1)

        return self.bisect_way(rows, way, most)

    def bisect_way(self, rows: Tensor, way: Way, most: Tensor) -> Tensor:
        """Where a way ends, at t = `most`, in a misclassified point, find the first such t > 0.

        Returns which of the images have a nearer point than before.
        """
        every = torch.arange(len(rows), device=rows.device)
        chosen = every[self.fools(rows, way(every, most))]
        low, high = torch.zeros_like(most[chosen]), most[chosen]
        for _ in range(BISECTIONS if len(chosen) else 0):
            middle = (low + high) / 2
            hit = self.fools(rows[chosen], way(chosen, middle))
            low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
        points, at = way(chosen, high), rows[chosen]
        distance = self.ball.norm(points - self.x[at])
        nearer = distance < self.distance[at]
        self.nearest[at[nearer]], self.distance[at[nearer]] = points[nearer], distance[nearer]
        return torch.isin(every, chosen[nearer])

    def normal(self, rows: Tensor, queries: int, generator: torch.Generator) -> Tensor:
        """Estimates of the normals of the boundary at the nearest points, of any length.

        The covariance of being misclassified and the offset, over Gaussian offsets as long as the
        point is far from the image.
        """
        point = self.nearest[rows]
        far = (point - self.x[rows]).flatten(1).square().mean(1).sqrt().clamp_min(TINY)
        both, offsets = torch.zeros_like(point), torch.zeros_like(point)
        hits = torch.zeros_like(far)
        for _ in range(queries):
            # The same for all images, as the windows of Square are.
            drawn = torch.empty_like(self.x[:1]).normal_(generator=generator)
            z = (point + per_image(far, point) * drawn).clamp_(0, 1)
            offset = (z - point) / per_image(far, point)
            hit = self.fools(rows, z).to(point.dtype)
            both += per_image(hit, point) * offset
            hits += hit
            offsets += offset
        return (both - per_image(hits / queries, point) * offsets) / queries

    def to_planes(self, rows: Tensor, normal: Tensor) -> Tensor:
        """Bisect the shortest ways to planes with this normal, up to twice as far as the point's.

        Returns which of the images have a nearer point than before.
        """
        gain = (normal * (self.nearest[rows] - self.x[rows])).flatten(1).sum(1).clamp_min(0)

        def way(chosen: Tensor, t: Tensor) -> Tensor:
            x = self.x[rows[chosen]]
            return (x + self.ball.shortest_way(normal[chosen], t, x)).clamp_(0, 1)

        return self.bisect_way(rows, way, 2 * gain)

    def hop(self, rows: Tensor, direction: Tensor, step: Tensor) -> None:
        """A step from the nearest points, halved until it is misclassified, and back to x."""
        end = self.nearest[rows]
        trying = torch.arange(len(rows), device=rows.device)
        for halving in range(HALVINGS):
            length = per_image(step[trying] / 2**halving, end)
            z = (self.nearest[rows[trying]] + length * direction[trying]).clamp_(0, 1)
            hit = self.fools(rows[trying], z)
            end[trying[hit]] = z[hit]
            trying = trying[~hit]
        self.bisect(rows, end - self.x[rows], torch.ones_like(step))


def _uniform(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty_like(x).uniform_(generator=generator)


def _stripes(x: Tensor, generator: torch.Generator) -> Tensor:
    """Columns of 0 and 1, for each image and channel."""
    return _uniform(x[..., :1, :], generator).round_().expand_as(x)


def _generators(count: int, generator: torch.Generator) -> list[torch.Generator]:
    device = generator.device
    seeds = torch.randint(2**62, (count,), generator=generator, device=device).tolist()
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def _blocks(x: Tensor) -> Iterator[Tensor]:
    """Masks (C, H, W): all pixels, their halves, quarters, and so on, over and over."""
    pixels = x[0].numel()
    index = torch.arange(pixels, device=x.device).view(x.shape[1:])
    while True:
        for level in range(math.ceil(math.log2(pixels)) + 1):
            size = math.ceil(pixels / 2**level)
            yield from ((index >= i) & (index < i + size) for i in range(0, pixels, size))
