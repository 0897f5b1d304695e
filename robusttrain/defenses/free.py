"""Free adversarial training: one backward pass for the weights and the perturbation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.attacks import Loss, ThreatFields
from robusttrain.defenses import Objective
from robusttrain.threat import Norm, check_lengths
from robusttrain.threat.balls import ball


@dataclass
class Free(ThreatFields):
    """min E[ L(f(x + d), y) ], where d and the weights take their steps together.

    Shafahi et al. 2019, Algorithm 1: each batch is replayed `replays` times. A replay takes one
    forward and one backward pass, which gives the gradient of the weights and, at the same point,
    the gradient of the step x + d <- project(x + d + step_size steepest(grad_x L)). d starts at 0
    and is kept from batch to batch, also in checkpoints. Each new image projects x + d on S(x), and
    d stays projected; the authors' code clips x + d to the box for the model, but does not change
    d. In l1, which the paper does not cover, a step moves one pixel in a hundred. The model is in
    train mode throughout.

    An epoch is one pass over the images, with `replays` steps on each batch. For the cost of
    standard training divide `epochs` by `replays`, as the paper does.

    Parameters
    ----------
    norm, eps
        The threat model; `eps` in pixel units of [0, 1], 0 or more.
    replays
        Steps on each batch, 1 or more: m of the paper.
    step_size
        Length of a step of the perturbation in the norm, in pixel units; `eps` if not given.
    """

    norm: Norm = Norm.linf
    eps: float = 8 / 255
    replays: int = 8
    step_size: float | None = None

    def __post_init__(self) -> None:
        check_lengths(self.norm, eps=self.eps)
        ranges.at_least(1, replays=self.replays)
        if self.step_size is not None:
            ranges.above(0, step_size=self.step_size)
            check_lengths(self.norm, step_size=self.step_size)
        self._delta: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """The perturbation d (N, C, H, W) that the next batch starts from; None at first."""
        return {"delta": self._delta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._delta = state["delta"]

    def inner(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator
    ) -> Tensor:
        """x + d with the d of the previous batch, as a leaf that requires gradients."""
        self._delta = self._delta_for(x)
        x_adv = ball(self.threat).project(x + self._delta[: len(x)], x)
        return x_adv.detach().requires_grad_()

    def outer(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, loss: Loss
    ) -> Objective:
        """The loss at x + d; clears the gradient of the previous replay."""
        x_adv.grad = None
        logits = model(x_adv)
        return Objective(loss(logits, y).mean(), adversarial=logits)

    def advance(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """x + d after a step along the gradient that the backward pass has left at `x_adv`."""
        assert self._delta is not None, "advance comes after inner"
        assert x_adv.grad is not None, "advance comes after a backward pass"
        threat, step = ball(self.threat), self.eps
        if self.step_size is not None:
            step = self.step_size
        slope, start = x_adv.grad.nan_to_num(0, 0, 0), x_adv.detach()
        x_adv = threat.project(start + step * threat.ascent(slope, start), x)
        self._delta[: len(x)] = x_adv - x
        return x_adv.detach().requires_grad_()

    def _delta_for(self, x: Tensor) -> Tensor:
        """The kept perturbation, with zeros appended if `x` is the longest batch so far."""
        kept = torch.zeros_like(x[:0]) if self._delta is None else self._delta.to(x.device)
        missing = max(0, len(x) - len(kept))
        return torch.cat([kept, torch.zeros_like(x[:missing])])
