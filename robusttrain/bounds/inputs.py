"""The set S(x) as the input of linear bounds: the least value of linear functions over it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from robusttrain.bounds.intervals import Interval
from robusttrain.threat import Norm, Threat

# Steps of the bisection for the multiplier of an l2 ball. Any multiplier gives a bound.
BISECTIONS = 24


@dataclass(frozen=True)
class InputSet:
    """S(x) of images `x` (N, ...): a ball of `threat`, intersected with the box [0, 1].

    Linear functions are given by coefficients (S, N, ...): S functions for each image.
    """

    x: Tensor
    threat: Threat

    @property
    def box(self) -> Interval:
        """The smallest box around S(x); in all norms `eps` is the largest change of a pixel."""
        return Interval.around(self.x, self.threat.eps)

    def minimum(self, coefficients: Tensor) -> Tensor:
        """A lower bound (S, N) of the least value of each function over S(x).

        In linf and l1 it is the least value. In l2 it is the larger of the bounds of ball and box
        alone, and the one of a Lagrange multiplier for the ball inside the box, which is close to
        the least value and never above it. Differentiable.
        """
        a = coefficients.flatten(2)
        at_x = (a * self.x.flatten(1)).sum(2)
        if self.threat.norm == Norm.linf:
            return at_x + (a * self._corner(a)).sum(2)
        if self.threat.norm == Norm.l1:
            return at_x + (a * self._spent(a.detach())).sum(2)
        ball = at_x - self.threat.eps * torch.linalg.vector_norm(a, dim=2)
        box = at_x + (a * self._corner(a)).sum(2)
        return torch.stack([ball, box, at_x + self._penalised(a)]).amax(0)

    def minimiser(self, coefficients: Tensor) -> Tensor:
        """Points (S, N, ...) of S(x), up to rounding, at which the functions are least.

        In l2 they are nearly least.
        """
        a = coefficients.flatten(2)
        if self.threat.norm == Norm.linf:
            moves = self._corner(a)
        elif self.threat.norm == Norm.l1:
            moves = self._spent(a)
        else:
            moves = self._moved(a, self._multiplier(a))
        return self.x + moves.view(coefficients.shape)

    @property
    def _ends(self) -> tuple[Tensor, Tensor]:
        """The least and the largest change of each pixel, (N, D)."""
        box, x = self.box, self.x.flatten(1)
        return box.lower.flatten(1) - x, box.upper.flatten(1) - x

    def _corner(self, a: Tensor) -> Tensor:
        low, high = self._ends
        return torch.where(a > 0, low, torch.where(a < 0, high, 0))

    def _spent(self, a: Tensor) -> Tensor:
        """The l1 radius, spent on one pixel after the other, in the order of |a|."""
        room = self._corner(a).abs()
        order = a.abs().argsort(dim=2, descending=True)
        sorted_room = room.gather(2, order)
        before = sorted_room.cumsum(2) - sorted_room
        spent = torch.minimum(sorted_room, (self.threat.eps - before).clamp_min(0))
        return -a.sign() * torch.zeros_like(a).scatter_(2, order, spent)

    def _penalised(self, a: Tensor) -> Tensor:
        """min over the box of <a, d> + t (|d|^2 - eps^2), at a good t > 0.

        It bounds <a, d> in the ball for every t, since the penalty is negative there.
        """
        t = self._multiplier(a.detach())
        d = self._moved(a.detach(), t)
        penalty = t.squeeze(2) * self.threat.eps**2
        least: Tensor = (a * d + t * d.square()).sum(2) - penalty
        return least

    def _moved(self, a: Tensor, t: Tensor) -> Tensor:
        return torch.clamp(-a / (2 * t), *self._ends)

    def _multiplier(self, a: Tensor) -> Tensor:
        """The t (S, N, 1) at which the penalised minimiser has the length `eps`."""
        kind = torch.finfo(a.dtype)
        most = torch.linalg.vector_norm(a, dim=2, keepdim=True) / (2 * self.threat.eps + kind.tiny)
        # Clamped, so that neither eps = 0 nor a function without slope gives NaN.
        high = most.clamp(kind.tiny**0.25, kind.max**0.25)
        low = high * kind.eps
        for _ in range(BISECTIONS):
            middle = (low * high).sqrt()
            long = torch.linalg.vector_norm(self._moved(a, middle), dim=2, keepdim=True)
            outside = long > self.threat.eps
            low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
        multiplier: Tensor = high
        return multiplier
