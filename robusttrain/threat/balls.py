"""Threat models: the ball of radius `eps` around an image, intersected with the box [0, 1].

For N images x of shape (N, ...), the set of allowed inputs is S(x) = {z in [0, 1] : ||z - x|| <=
eps}, for each image separately. All tensors have the shape of x; radii and steps are in pixel units
of [0, 1]. Attacks and defenses leave everything that depends on the norm to this module, except for
a few attacks whose papers have a different search for each norm.

Rounding to float32 can move a point out of a small ball by more than a part in 100,000 of its
radius. The points that `project`, `random_start` and `linear_maximiser` return are corrected for
it: they are in the box, and ||z - x|| <= (1 + TOLERANCE) eps in float64 for any radius.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from robusttrain import ranges
from robusttrain.threat import Norm, Threat

# Smallest divisor of norms. A smaller norm carries no information, and would overflow in float32.
TINY = 1e-12

# By this share of the radius a point may lie outside of a ball, measured in float64.
TOLERANCE = 1e-5


class Ball(Protocol):
    """The norm ball of radius `eps`, as made by `ball`."""

    @property
    def eps(self) -> float:
        """The radius, in pixel units."""

    def norm(self, delta: Tensor) -> Tensor:
        """||delta|| of each image, shape (N,)."""

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Project `x_adv` on S(x)."""

    def project_each(self, x_adv: Tensor, x: Tensor, radius: Tensor) -> Tensor:
        """As `project`, on a ball of its own `radius` (N,) for each image, up to rounding."""

    def random_offset(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A perturbation that is uniform in the ball, for each image; it may leave the box."""

    def random_start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A random point of S(x): `random_offset`, clipped to the box."""

    def steepest(self, gradient: Tensor) -> Tensor:
        """The d with ||d|| <= 1 that maximises <gradient, d>, for each image."""

    def ascent(self, gradient: Tensor, x_adv: Tensor) -> Tensor:
        """The direction, of norm at most 1, of a step of an iterated attack at `x_adv`."""

    def sparse_ascent(self, gradient: Tensor, x_adv: Tensor, count: Tensor) -> Tensor:
        """As `ascent`, but in l1 with at most `count` (N,) nonzero pixels per image."""

    def shortest_way(self, weights: Tensor, gain: Tensor, x: Tensor) -> Tensor:
        """The shortest d with <weights, d> = gain (N,) and x + d in the box, for any radius.

        If the box does not allow this gain, d reaches the largest possible one.
        """

    def linear_maximiser(self, gradient: Tensor, x: Tensor) -> Tensor:
        """The z in S(x) that maximises <gradient, z - x>.

        In l2 it maximises over the ball, and is then clipped to the box.
        """

    def dual_norm(self, gradient: Tensor) -> Tensor:
        """max <gradient, d> over ||d|| <= 1 of each image, shape (N,); differentiable."""


@dataclass(frozen=True)
class _Radius:
    eps: float

    def __post_init__(self) -> None:
        ranges.at_least(0, eps=self.eps)

    def random_offset(self, x: Tensor, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def random_start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return self._rounded((x + self.random_offset(x, generator)).clamp_(0, 1), x)

    def _rounded(self, z: Tensor, x: Tensor) -> Tensor:
        """Correct a point `z` of the box so that it is in the ball despite rounding.

        If the radius is so large, and the pixels so few, that rounding cannot lead out of the ball,
        `z` is returned without any computation.
        """
        # The largest rounding error of numbers below 1.
        half_a_step = torch.finfo(x.dtype).eps / 4
        if half_a_step * self._norm_of_ones(x[:1].numel()) <= self._most - self.eps:
            return z
        start, end = in_float64(x), in_float64(z)
        delta = end - start
        cut = self._cut(delta, end)
        near = (start + cut).to(x.dtype)
        too_far = (near.double() - start).abs() > cut.abs()
        # Rounding towards x shortens the move of each pixel.
        near = torch.where(too_far, torch.nextafter(near, start.to(x.dtype)), near)
        return torch.where((cut == delta).to(z.device), z, near.to(z.device))

    @property
    def _most(self) -> float:
        """The largest norm that is not cut. Half of the tolerance remains for other rounding."""
        return self.eps * (1 + TOLERANCE / 2)

    def _norm_of_ones(self, pixels: int) -> float:
        """The norm of a perturbation that is 1 in each of `pixels` pixels."""
        raise NotImplementedError

    def _cut(self, delta: Tensor, z: Tensor) -> Tensor:
        """`delta` = z - x, shortened to norm `eps` for the images in which it is too long."""
        raise NotImplementedError

    def steepest(self, gradient: Tensor) -> Tensor:
        raise NotImplementedError

    def ascent(self, gradient: Tensor, x_adv: Tensor) -> Tensor:
        return self.steepest(gradient)

    def sparse_ascent(self, gradient: Tensor, x_adv: Tensor, count: Tensor) -> Tensor:
        return self.ascent(gradient, x_adv)

    def shortest_way(self, weights: Tensor, gain: Tensor, x: Tensor) -> Tensor:
        flat = weights.flatten(1)
        # Scaled, since the tiny weights of a confident model would be lost in guards such as TINY.
        scale = flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
        # Each pixel can gain in one direction only; the length of its move remains to be found.
        direction = flat.sign() * gain.sign().unsqueeze(1)
        room, slopes = _room(direction, x.flatten(1)), flat.abs() / scale
        # An unreachable gain is clipped, since it would overflow if the weights are nearly zero.
        most = (slopes * room).sum(1, keepdim=True)
        moves = self._spend(slopes, room, torch.minimum(gain.abs().unsqueeze(1) / scale, most))
        return (direction * moves).view_as(x)

    def _spend(self, slopes: Tensor, room: Tensor, gain: Tensor) -> Tensor:
        """The shortest moves (N, D), each from 0 to `room`, with <slopes, moves> = gain (N, 1)."""
        raise NotImplementedError


class LinfBall(_Radius):
    """The change of every pixel is at most `eps`."""

    def norm(self, delta: Tensor) -> Tensor:
        return delta.flatten(1).abs().amax(1)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return self._rounded(torch.clamp(x_adv, x - self.eps, x + self.eps).clamp_(0, 1), x)

    def project_each(self, x_adv: Tensor, x: Tensor, radius: Tensor) -> Tensor:
        most = per_image(radius, x)
        return torch.clamp(x_adv, x - most, x + most).clamp_(0, 1)

    def _norm_of_ones(self, pixels: int) -> float:
        return 1

    def _cut(self, delta: Tensor, z: Tensor) -> Tensor:
        return torch.where(delta.abs() > self._most, delta.clamp(-self.eps, self.eps), delta)

    def random_offset(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return torch.empty_like(x).uniform_(-self.eps, self.eps, generator=generator)

    def steepest(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def _spend(self, slopes: Tensor, room: Tensor, gain: Tensor) -> Tensor:
        return _filled(slopes, torch.ones_like(slopes), room, gain)

    def linear_maximiser(self, gradient: Tensor, x: Tensor) -> Tensor:
        return self._rounded((x + self.eps * self.steepest(gradient)).clamp_(0, 1), x)

    def dual_norm(self, gradient: Tensor) -> Tensor:
        return gradient.flatten(1).abs().sum(1)


class L2Ball(_Radius):
    """The Euclidean norm of the perturbation of an image is at most `eps`."""

    def norm(self, delta: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
        return length

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return self._rounded(self._shortened(x_adv, x, self.eps), x)

    def project_each(self, x_adv: Tensor, x: Tensor, radius: Tensor) -> Tensor:
        return self._shortened(x_adv, x, radius)

    def _shortened(self, x_adv: Tensor, x: Tensor, radius: Tensor | float) -> Tensor:
        # Ball first, box second: clipping moves each pixel towards x, so it never leaves the ball.
        delta = x_adv - x
        shrink = (radius / self.norm(delta).clamp_min(TINY)).clamp_max(1)
        return (x + delta * per_image(shrink, x)).clamp_(0, 1)

    def _norm_of_ones(self, pixels: int) -> float:
        return math.sqrt(pixels)

    def _cut(self, delta: Tensor, z: Tensor) -> Tensor:
        norm = self.norm(delta)
        share = torch.where(norm > self._most, self.eps / norm.clamp_min(TINY), 1)
        return delta * per_image(share, delta)

    def random_offset(self, x: Tensor, generator: torch.Generator) -> Tensor:
        direction = torch.empty_like(x).normal_(generator=generator)
        radius = self.eps * _ball_radius(x, generator)
        scale = radius / self.norm(direction).clamp_min(TINY)
        return direction * per_image(scale, x)

    def steepest(self, gradient: Tensor) -> Tensor:
        # A confident model has tiny gradients, whose squares underflow unless scaled up first.
        largest = gradient.flatten(1).abs().amax(1).clamp_min(torch.finfo(gradient.dtype).tiny)
        scaled = gradient / per_image(largest, gradient)
        return scaled / per_image(self.norm(scaled).clamp_min(TINY), gradient)

    def _spend(self, slopes: Tensor, room: Tensor, gain: Tensor) -> Tensor:
        return _filled(slopes, slopes, room, gain)

    def linear_maximiser(self, gradient: Tensor, x: Tensor) -> Tensor:
        return self._rounded((x + self.eps * self.steepest(gradient)).clamp_(0, 1), x)

    def dual_norm(self, gradient: Tensor) -> Tensor:
        # The square root has no derivative at 0; the guard keeps second derivatives finite there.
        return gradient.flatten(1).square().sum(1).add(TINY**2).sqrt()


# The share of the pixels that one l1 step moves (SLIDE, Tramer and Boneh 2019, moves 1 %).
L1_STEP_SHARE = 0.01


class L1Ball(_Radius):
    """The absolute changes of all pixels of an image sum to at most `eps`.

    The box matters more here than for the other norms: it nearly cancels a step that spends the
    whole radius on one pixel. `project` is therefore the exact Euclidean projection on the
    intersection of ball and box (Croce and Hein 2021, "Mind the box", Proposition 3.1), `ascent`
    uses only pixels that can still move, and `linear_maximiser` spends the radius on one pixel
    after the other, in the order of their gradients.
    """

    def norm(self, delta: Tensor) -> Tensor:
        return delta.flatten(1).abs().sum(1)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        delta = (x_adv - x).flatten(1)
        room = _room(delta, x.flatten(1))
        moved = delta.abs()
        threshold = _l1_threshold(moved, room, self.eps)
        kept = torch.minimum((moved - threshold).clamp_min(0), room)
        # For distant points the rounding of the sums over all pixels leaves a visible excess.
        # Pixels at a face of the box stay exactly there, so that attacks know they cannot move.
        free = torch.where(kept < room, kept, 0)
        rest = (kept.sum(1, keepdim=True) - self.eps).clamp_min(0)
        kept = kept - free * (rest / free.sum(1, keepdim=True).clamp_min(TINY)).clamp_max(1)
        # If all pixels that move are at faces of the box, these have to give up the excess.
        kept = self._less(kept, kept)
        return self._rounded((x + (delta.sign() * kept).view_as(x)).clamp_(0, 1), x)

    def project_each(self, x_adv: Tensor, x: Tensor, radius: Tensor) -> Tensor:
        delta = (x_adv - x).flatten(1)
        room, moved = _room(delta, x.flatten(1)), delta.abs()
        threshold = _l1_threshold(moved, room, radius.unsqueeze(1))
        kept = torch.minimum((moved - threshold).clamp_min(0), room)
        return (x + (delta.sign() * kept).view_as(x)).clamp_(0, 1)

    def _norm_of_ones(self, pixels: int) -> float:
        return pixels

    def _cut(self, delta: Tensor, z: Tensor) -> Tensor:
        moved = delta.flatten(1).abs()
        free = torch.where(((z > 0) & (z < 1)).flatten(1), moved, 0)
        less = self._less(moved, free)
        return delta.sign() * self._less(less, less).view_as(delta)

    def _less(self, moved: Tensor, free: Tensor) -> Tensor:
        """`moved` (N, D), where the pixels in `free` give up what exceeds the radius, if any."""
        norm = moved.sum(1, keepdim=True)
        rest = torch.where(norm > self._most, norm - self.eps, 0)
        most = free.sum(1, keepdim=True).clamp_min(torch.finfo(moved.dtype).tiny)
        return moved - free * (rest / most).clamp_max(1)

    def random_offset(self, x: Tensor, generator: torch.Generator) -> Tensor:
        # Exponential variables divided by their sum are uniform on the simplex; signs are random.
        sizes = torch.empty_like(x).exponential_(generator=generator)
        signs = torch.empty_like(x).uniform_(-1, 1, generator=generator).sign()
        scale = self.eps * _ball_radius(x, generator) / self.norm(sizes)
        return signs * sizes * per_image(scale, x)

    def steepest(self, gradient: Tensor) -> Tensor:
        return self._largest(gradient.flatten(1), 1).view_as(gradient)

    def ascent(self, gradient: Tensor, x_adv: Tensor) -> Tensor:
        flat = gradient.flatten(1)
        movable = torch.where(_room(flat, x_adv.flatten(1)) > 0, flat, 0)
        count = max(1, round(L1_STEP_SHARE * flat.shape[1]))
        return self._largest(movable, count).view_as(gradient)

    def sparse_ascent(self, gradient: Tensor, x_adv: Tensor, count: Tensor) -> Tensor:
        flat = gradient.flatten(1)
        movable = torch.where(_room(flat, x_adv.flatten(1)) > 0, flat, 0)
        ordered = movable.abs().sort(dim=1, descending=True).values
        last = count.clamp(1, flat.shape[1]).long().unsqueeze(1) - 1
        chosen = torch.where(movable.abs() >= ordered.gather(1, last), movable, 0).sign()
        return (chosen / chosen.abs().sum(1, keepdim=True).clamp_min(1)).view_as(gradient)

    def _spend(self, slopes: Tensor, room: Tensor, gain: Tensor) -> Tensor:
        # The steepest pixels first, each as far as its room, until the gain is reached.
        steepest_first = slopes.argsort(dim=1, descending=True)
        slope = slopes.gather(1, steepest_first)
        gains = slope * room.gather(1, steepest_first)
        missing = (gain - (gains.cumsum(1) - gains)).clamp_min(0)
        moves = torch.minimum(missing, gains) / slope.clamp_min(TINY)
        return torch.zeros_like(moves).scatter_(1, steepest_first, moves)

    def linear_maximiser(self, gradient: Tensor, x: Tensor) -> Tensor:
        flat = gradient.flatten(1)
        order = flat.abs().argsort(dim=1, descending=True, stable=True)
        # A pixel with gradient 0 gains nothing and keeps its value.
        room = torch.where(flat != 0, _room(flat, x.flatten(1)), 0).gather(1, order)
        spent_before = room.cumsum(1) - room
        spent = torch.minimum(room, (self.eps - spent_before).clamp_min(0))
        moves = torch.zeros_like(flat).scatter_(1, order, spent) * flat.sign()
        return self._rounded((x + moves.view_as(x)).clamp_(0, 1), x)

    def dual_norm(self, gradient: Tensor) -> Tensor:
        return gradient.flatten(1).abs().amax(1)

    @staticmethod
    def _largest(flat: Tensor, count: int) -> Tensor:
        """Signs of the `count` largest entries of each row, divided by their number."""
        chosen = flat.abs().topk(count, dim=1).indices
        signs = flat.gather(1, chosen).sign()
        share = signs.abs().sum(1, keepdim=True).clamp_min(1)
        return torch.zeros_like(flat).scatter_(1, chosen, signs / share)


def ball(threat: Threat) -> Ball:
    """The ball of a threat model, with its computations.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[0.5, 0.95]])
    >>> ball(Threat(Norm.linf, 0.1)).linear_maximiser(torch.tensor([[-1.0, 2.0]]), x)
    tensor([[0.4000, 1.0000]])
    """
    balls: dict[Norm, Callable[[float], Ball]] = {
        Norm.linf: LinfBall,
        Norm.l2: L2Ball,
        Norm.l1: L1Ball,
    }
    return balls[threat.norm](threat.eps)


def striped_start(ball: Ball, x: Tensor, generator: torch.Generator) -> Tensor:
    """A point of S(x) with vertical stripes of size `eps`, with one sign per column and channel.

    It is the start of the Square Attack in linf (Andriushchenko et al. 2020, Algorithm 2). In l2
    and l1 the stripes are projected.
    """
    signs = torch.empty_like(x[..., :1, :]).uniform_(-1, 1, generator=generator).sign()
    return ball.project(x + ball.eps * signs, x)


def in_float64(x: Tensor) -> Tensor:
    """`x` in float64, on the CPU if its device has no float64 (MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Reshape `values` (N,) so that they broadcast over images `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _ball_radius(x: Tensor, generator: torch.Generator) -> Tensor:
    """The radius (N,) of a uniform point in the unit ball of the dimension of an image."""
    dimension = x[0].numel()
    return torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype) ** (
        1 / dimension
    )


def _room(direction: Tensor, x: Tensor) -> Tensor:
    """The distance of each pixel to the box's face in the direction of the sign of `direction`."""
    return torch.where(direction > 0, 1 - x, x)


# Limit on the steps of Newton's method in `_filled`, which usually takes a handful.
NEWTON_STEPS = 50

# Newton's method stops when the relative growth of t is below this, which is rounding.
PRECISION = 1e-7


def _filled(slopes: Tensor, speeds: Tensor, room: Tensor, gain: Tensor) -> Tensor:
    """Moves min(t * speeds, room) with the smallest t for which <slopes, moves> = gain (N, 1).

    The gain is concave and piecewise linear in t. Newton's method from t = 0 therefore approaches
    the solution from below, and ends after finitely many steps.
    """
    end, rates, gains = room / speeds.clamp_min(TINY), slopes * speeds, slopes * room
    all_gains = gains.sum(1, keepdim=True)
    t = gain / rates.sum(1, keepdim=True).clamp_min(TINY)
    for _ in range(NEWTON_STEPS):
        moving = (end > t).to(room.dtype)
        rate = (rates * moving).sum(1, keepdim=True)
        missing = gain - all_gains + (gains * moving).sum(1, keepdim=True)
        # If no pixel can move any more, the box is the limit.
        ahead = torch.where(rate > TINY, missing / rate, t)
        if bool((ahead <= t * (1 + PRECISION)).all()):
            break
        t = torch.maximum(t, ahead)
    return torch.minimum(t * speeds, room)


def _l1_threshold(moved: Tensor, room: Tensor, eps: Tensor | float) -> Tensor:
    """The smallest t >= 0 of each row with sum clip(moved - t, 0, room) <= eps, shape (N, 1).

    The sum falls piecewise linearly in t, with kinks where a pixel leaves its bound (at
    moved - room) and where it reaches zero (at moved). Between two kinks t solves a linear
    equation. The sum at every kink comes from one sort and two cumulative sums.
    """
    kinks = torch.cat([(moved - room).clamp_min(0), moved], 1)
    # Right of its first kink a pixel falls with slope -1, right of its second it is flat again.
    slopes = torch.cat([-torch.ones_like(moved), torch.ones_like(moved)], 1)
    kinks, order = kinks.sort(dim=1)
    slopes = slopes.gather(1, order).cumsum(1)
    start = torch.minimum(moved, room).sum(1, keepdim=True)
    falls = slopes[:, :-1] * (kinks[:, 1:] - kinks[:, :-1])
    sums = start + torch.cat([torch.zeros_like(start), falls.cumsum(1)], 1)
    # The last kink whose sum is still above eps starts the piece that holds the solution.
    last = ((sums > eps).sum(1, keepdim=True) - 1).clamp_min(0)
    slope = slopes.gather(1, last).clamp_max(-1)
    threshold = kinks.gather(1, last) + (eps - sums.gather(1, last)) / slope
    return torch.where(start > eps, threshold, 0)
