"""Planted models that predict honestly and hand out a wrong gradient, or none."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from masking.adaptive import Nearby
from masking.base import Masked, off_grid, straight_through, without_gradient

Activation = Callable[[Tensor], Tensor]

Bend = Callable[[Tensor], Tensor]
"""A gradient (N, C, H, W) to another one."""


class _Bent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bend: Bend) -> Tensor:
        ctx.bend = bend
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.bend(gradient[0]), None


class BentGradient(Masked):
    """Predicts as the network does, and changes the gradient on its way back to the image."""

    def __init__(self, network: nn.Module, bend: Bend) -> None:
        super().__init__(network)
        self.bend = bend

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(_Bent.apply(x, self.bend))
        return logits


def reversed_(gradient: Tensor) -> Tensor:
    """Points downhill."""
    return -gradient


def random(gradient: Tensor) -> Tensor:
    """Points anywhere, and is as long as before."""
    noise = torch.randn_like(gradient)
    return noise * gradient.norm() / noise.norm()


def noisy(gradient: Tensor) -> Tensor:
    """Drowns the slope in noise ten times as large."""
    size = gradient.flatten(1).abs().mean(1).view(-1, 1, 1, 1)
    return gradient + 10 * size * torch.randn_like(gradient)


def rolled(gradient: Tensor) -> Tensor:
    """Hands each image the gradient of its neighbour in the batch."""
    return gradient.roll(1, 0)


def smallest(gradient: Tensor) -> Tensor:
    """Keeps the half of the entries that matter least: an overdone clipping of gradients."""
    median = gradient.flatten(1).abs().median(1).values.view(-1, 1, 1, 1)
    return torch.where(gradient.abs() > median, 0, gradient)


def mirrored(gradient: Tensor) -> Tensor:
    """Is flipped left to right: a preprocessing that was undone on one way only."""
    return gradient.flip(3)


def underflowing(gradient: Tensor) -> Tensor:
    """Is so faint that squares of it, and soon itself, are zero."""
    return gradient * 1e-36


class NanBranch(Masked):
    """Adds a branch of value 0 whose slope is 0 times infinity, for all images."""

    def forward(self, x: Tensor) -> Tensor:
        nothing = (x - x.detach()).square().flatten(1).sum(1).sqrt()
        logits: Tensor = self.network(x) + nothing[:, None]
        return logits


class NanOffGrid(Masked):
    """Has such a branch only for images with pixels that are no bytes: clean images look sane."""

    def forward(self, x: Tensor) -> Tensor:
        squared = (x - x.detach()).square().flatten(1).sum(1)
        # The slope of the root is infinite at 0, and finite at 1.
        root = (squared + (~off_grid(x)).float()).sqrt()
        logits: Tensor = self.network(x) + (root - root.detach())[:, None]
        return logits


class Detached(Masked):
    """Runs the network under `no_grad`: true logits, and a gradient of zero."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            logits = self.network(x)
        return without_gradient(logits, x)


class GradMode(Masked):
    """Answers by a decoy where somebody asks for gradients, and by the network otherwise."""

    def __init__(self, network: nn.Module, decoy: nn.Module) -> None:
        super().__init__(network)
        self.decoy = decoy

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.decoy if torch.is_grad_enabled() else self.network
        logits: Tensor = chosen(x)
        return logits


class Hidden(nn.Module):
    """Two hidden layers of 256 with an activation of choice, between batch normalisations."""

    def __init__(self, activation: Activation, width: int = 256) -> None:
        super().__init__()
        self.activation = activation
        self.first, self.second = nn.Linear(64, width), nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(2))
        self.last = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10)."""
        hidden = x.flatten(1)
        for layer, norm in zip((self.first, self.second), self.norms, strict=True):
            hidden = self.activation(norm(layer(hidden)))
        logits: Tensor = self.last(hidden)
        return logits

    def with_activation(self, activation: Activation) -> "Hidden":
        """A copy with the same weights."""
        other = copy.deepcopy(self)
        other.activation = activation
        return other


def winners(hidden: Tensor) -> Tensor:
    """The largest tenth of the activations, and 0 for the others."""
    least = hidden.topk(hidden.shape[1] // 10, dim=1).values[:, -1:]
    return torch.where(hidden >= least, hidden, 0)


def sign_flat(hidden: Tensor) -> Tensor:
    """The sign, whose gradient is zero."""
    return without_gradient(hidden.sign(), hidden)


def saturated(hidden: Tensor) -> Tensor:
    """A hyperbolic tangent so steep that its gradient underflows."""
    return (1000 * hidden).tanh()


def soft_sign(hidden: Tensor) -> Tensor:
    """A hyperbolic tangent that can be climbed."""
    return (2 * hidden).tanh()


def sign_through(hidden: Tensor) -> Tensor:
    """The sign, with the gradient of a steep hyperbolic tangent."""
    return straight_through(hidden.sign(), soft_sign(hidden))


class OtherActivation(Masked):
    """`Hidden` layers that predict with an activation whose slope is zero, or leads nowhere.

    The attacker climbs the same layers with each of the activations `climbed`.
    """

    def __init__(
        self, network: Hidden, activation: Activation, climbed: Sequence[Activation]
    ) -> None:
        super().__init__(network.with_activation(activation))
        self.climbed = climbed

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits

    def views(self) -> list[nn.Module]:
        assert isinstance(self.network, Hidden)
        return [self.network.with_activation(each) for each in self.climbed]


class WinnersTakeAll(Masked):
    """Keeps the largest tenth of the activations, so that slopes jump (Xiao et al. 2020).

    Trained so, and broken by slopes that are averaged nearby (Tramer et al. 2020).
    """

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits

    def views(self) -> list[nn.Module]:
        return [Nearby(self.network, 0.02), Nearby(self.network, 0.05), self.network]
