"""Square Attack, a random search that asks for outputs only (Andriushchenko et al. 2020)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from robusttrain import ranges
from robusttrain.attacks import Traits
from robusttrain.attacks.attack_loss import AttackLoss
from robusttrain.attacks.ball_attack import BallAttack
from robusttrain.attacks.objectives import margin, remaining
from robusttrain.attacks.search_state import BestPoints, PerImageState, remaining_indices
from robusttrain.threat import Norm
from robusttrain.threat.balls import TINY, Ball, per_image

# After how many queries the share of the pixels that a square covers halves again, in a search of
# AutoAttack's length; other lengths go through the same schedule at another pace.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000)
USUAL_QUERIES = 5000

# The first perturbation of the l2 and l1 attacks is a grid of so many bumps a side.
BUMPS_A_SIDE = 5

# Share of the queries after which a search ends, if its relative margin is above the limit. Shorter
# searches than the usual one see as many queries before, for a margin falls most at first.
GIVE_UP = ((0.2, 0.4), (0.4, 0.25))

Window = tuple[slice, slice]
"""PerImageState and columns of a square."""


@dataclass
class Square(BallAttack):
    """Random search that changes one square window at a time and keeps what lowers the margin.

    In linf (Algorithm 2) the window is set to x +- eps, one sign a channel, starting from vertical
    stripes. In l2 (Algorithm 3) a window gets a bump, and with it the norm that another window
    gives up; in l1 the same with a steeper bump and the exact projection on ball and box (Croce and
    Hein 2021). A square covers the share `p_init` of the pixels at first, and half as many after
    10, 50, 200, 500, 1000, 2000 and 4000 of 5,000 queries, or the same shares of another number.
    All images of a call get the same windows, each with signs of its own. One forward pass a query;
    an image is done with once it is fooled.

    Parameters
    ----------
    queries
        Queries a search, 1 or more.
    restarts
        Searches, 1 or more.
    p_init
        Share of the pixels that the first squares cover, in ]0, 1].
    give_up
        Whether a search ends that is far from success: after 20 and 40 % of the queries, but 1,000
        and 2,000 at least, if the margin, relative to the spread of the logits as in the DLR loss,
        is above 0.4 and 0.25.
        Where not given, in linf only: on networks trained against linf 0.3 on MNIST it never fell
        by more than 0.24 and 0.17 in the queries that remained.
    """

    queries: int = 5000
    restarts: int = 1
    p_init: float = 0.8
    give_up: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.at_least(1, queries=self.queries, restarts=self.restarts)
        if self.give_up is None:
            self.give_up = self.norm is Norm.linf
        ranges.require(0 < self.p_init <= 1, "p_init", self.p_init, "above 0, and 1 at most")

    @property
    def traits(self) -> Traits:
        """What kind of an attack it is."""
        return replace(super().traits, black_box=True, own_objective=True)

    def search(self, surrogate: AttackLoss, x: Tensor, generator: torch.Generator) -> Tensor:
        """The first point that fools the model, or the one of lowest margin."""
        if not surrogate.targeted:
            surrogate = replace(surrogate, loss=margin)
        moves = MOVES[self.norm](self.ball, len(x), generator)
        best = BestPoints(x)
        for _ in range(self.restarts):
            rows = best.remaining
            if len(rows):
                self._run(_Search.of(rows, surrogate.take(rows), x[rows]), moves, best)
        return best.x_adv

    def _run(self, search: "_Search", moves: "_Moves", best: BestPoints) -> None:
        height, width = search.x.shape[-2:]
        # All at once: a draw that Python has to see makes it wait for the device.
        places = moves.uniform(self.queries, 5).tolist()
        search = search.tried(moves.start(search), best)
        longest = max(self.queries, USUAL_QUERIES)
        limits = {round(share * longest): limit for share, limit in GIVE_UP}
        for query, (top, left, *rest) in enumerate(places[1:]):
            if self.give_up and query in limits:
                far = remaining(search.surrogate, search.x_adv) > limits[query]
                search = search.take(remaining_indices(far))
            if len(search.rows) == 0:
                return
            side = moves.fitting(self._side(query, height, width), min(height, width))
            target = _window(height, width, side, top, left)
            donor = _window(height, width, side, *rest[:2])
            x_new = moves.propose(search, target, donor, upright=rest[2] < 0.5)
            search = search.tried(x_new, best)

    def _side(self, query: int, height: int, width: int) -> int:
        usual = query * USUAL_QUERIES // self.queries
        halvings = sum(usual > start for start in HALVINGS)
        return max(1, round(math.sqrt(self.p_init / 2**halvings * height * width)))


@dataclass
class _Search(PerImageState):
    """A search under way: its images and the best point of each."""

    rows: Tensor
    surrogate: AttackLoss
    x: Tensor
    x_adv: Tensor
    value: Tensor

    @classmethod
    def of(cls, rows: Tensor, surrogate: AttackLoss, x: Tensor) -> "_Search":
        value = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
        return cls(rows, surrogate, x, x.clone(), value)

    def tried(self, x_new: Tensor, best: BestPoints) -> "_Search":
        """Keep `x_new` where it is better; returns the search for those that are not fooled."""
        value, logits = self.surrogate.score(x_new)
        fooled = self.surrogate.succeeded(logits)
        better = (value > self.value) | fooled
        changed = better.nonzero().squeeze(1)
        self.x_adv[changed], self.value[changed] = x_new[changed], value[changed]
        best.offer(self.rows[changed], x_new[changed], value[changed], fooled[changed])
        return self.take(remaining_indices(fooled)) if bool(fooled.any()) else self


class _Moves(Protocol):
    """Where a search starts and what it tries; draws are for all images of the call."""

    def uniform(self, *shape: int) -> Tensor:
        """Numbers from [0, 1[."""

    def fitting(self, side: int, largest: int) -> int:
        """The side of a square that can be used instead of `side`."""

    def start(self, search: _Search) -> Tensor:
        """The first points."""

    def propose(self, search: _Search, target: Window, donor: Window, upright: bool) -> Tensor:
        """The next points to try: new values at `target`, at the cost of `donor`."""


@dataclass(frozen=True)
class _Draws:
    ball: Ball
    count: int
    generator: torch.Generator

    def uniform(self, *shape: int) -> Tensor:
        device = self.generator.device
        return torch.rand(*shape, generator=self.generator, device=device)

    def signs(self, like: Tensor, rows: Tensor, width: int = 1) -> Tensor:
        """-1 or 1 for each image at `rows`, channel and column of `width`."""
        drawn = self.uniform(self.count, like.shape[1], 1, width) < 0.5
        return torch.where(drawn[rows], -1, 1).to(like.dtype)


class _Stripes(_Draws):
    """linf: every pixel at the edge of the ball."""

    def fitting(self, side: int, largest: int) -> int:
        return min(side, largest)

    def start(self, search: _Search) -> Tensor:
        signs = self.signs(search.x, search.rows, search.x.shape[-1])
        return self.ball.linear_maximiser(signs, search.x)

    def propose(self, search: _Search, target: Window, donor: Window, upright: bool) -> Tensor:
        x_new = search.x_adv.clone()
        signs = self.signs(search.x, search.rows)
        x_new[:, :, *target] = self.ball.linear_maximiser(signs, search.x[:, :, *target])
        return x_new


@dataclass(frozen=True)
class _Bumps(_Draws):
    """l2 and l1: the whole radius is spent in bumps that fall off by the power `fall`."""

    power: float
    fall: int

    def fitting(self, side: int, largest: int) -> int:
        return min(max(side, 3) | 1, largest)

    def start(self, search: _Search) -> Tensor:
        height, width = search.x.shape[-2:]
        side = max(1, min(height, width) // BUMPS_A_SIDE)
        delta = torch.zeros_like(search.x)
        for top in range((height % side) // 2, height - side + 1, side):
            for left in range((width % side) // 2, width - side + 1, side):
                bump = self._bump(side, upright=bool(self.uniform(1) < 0.5)).to(delta)
                bumps = bump * self.signs(search.x, search.rows)
                delta[:, :, top : top + side, left : left + side] = bumps
        return self._spend_all(search, delta)

    def propose(self, search: _Search, target: Window, donor: Window, upright: bool) -> Tensor:
        delta = search.x_adv - search.x
        freed = torch.zeros_like(delta)
        for window in (target, donor):
            freed[:, :, *window] = delta[:, :, *window]
        unspent = self.ball.eps**self.power - self._mass(delta).sum(1, keepdim=True)
        budget = unspent.clamp_min(0) / delta.shape[1] + self._mass(freed)
        side = target[0].stop - target[0].start
        bump = self._bump(side, upright).to(delta) * self.signs(search.x, search.rows)
        new = self._unit(bump + self._unit(delta[:, :, *target]))
        delta[:, :, *donor] = 0
        delta[:, :, *target] = new * budget ** (1 / self.power)
        return self._spend_all(search, delta)

    def _mass(self, delta: Tensor) -> Tensor:
        """The norm of each channel to the power of the norm, (N, C, 1, 1)."""
        return delta.abs().pow(self.power).sum((-2, -1), keepdim=True)

    def _unit(self, delta: Tensor) -> Tensor:
        return delta / self._mass(delta).pow(1 / self.power).clamp_min(TINY)

    def _spend_all(self, search: _Search, delta: Tensor) -> Tensor:
        scale = self.ball.eps / self.ball.norm(delta).clamp_min(TINY)
        return self.ball.project(search.x + delta * per_image(scale, delta), search.x)

    def _bump(self, side: int, upright: bool) -> Tensor:
        """Two halves of opposite sign, (side, side), with norm 1."""
        upper, lower = side // 2, side - side // 2
        hills = self._unit(self._hill(upper, side)), self._unit(self._hill(lower, side))
        halves = torch.cat([hills[0], -hills[1]])
        return self._unit(halves if upright else halves.T)

    def _hill(self, height: int, width: int) -> Tensor:
        """Squares of growing size on top of each other, the k-th 1 / k**fall high (section 3.3)."""
        distances = [(torch.arange(n) - n // 2).abs() for n in (height, width)]
        ring = torch.maximum(distances[0][:, None], distances[1][None, :])
        sizes = torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64)
        heights = (1 / sizes**self.fall).flip(0).cumsum(0).flip(0)
        return heights[ring]


MOVES: dict[Norm, Callable[[Ball, int, torch.Generator], _Moves]] = {
    Norm.linf: _Stripes,
    Norm.l2: partial(_Bumps, power=2.0, fall=2),
    Norm.l1: partial(_Bumps, power=1.0, fall=4),
}


def _window(height: int, width: int, side: int, top: float, left: float) -> Window:
    """A square with `side` pixels; `top` and `left` in [0, 1[ say where between the edges."""
    first_row, first_column = int(top * (height - side + 1)), int(left * (width - side + 1))
    return slice(first_row, first_row + side), slice(first_column, first_column + side)
