"""Free adversarial training: one backward pass for the weights and the perturbation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.attacks import Loss, ThreatFields
from robusttrain.defenses import Objective
from robusttrain.threat import Norm
from robusttrain.threat.balls import ball


@dataclass
class Free(ThreatFields):
    """min E[ L(f(x + d), y) ], d one step further with each step of the weights.

    Shafahi et al. 2019, Algorithm 1: a batch is replayed `replays` times, and each of them takes
    one forward and one backward pass, which gives the gradient of the weights and, at the same
    point, that of the step x + d <- project(x + d + step_size steepest(grad_x L)). d starts at 0,
    and goes on from batch to batch, and through checkpoints. Where an image meets it, x + d is
    projected on S(x), and what goes on is what the last image has left of it: the authors' code
    cuts with the box what the model sees, but not d. In l1, of which the paper does not speak, a
    step moves one pixel in a hundred. The model is in train mode throughout.

    An epoch stays one pass over the images, and takes `replays` steps on each batch: for the cost
    of standard training divide `epochs` by `replays`, as the paper does.

    Parameters
    ----------
    norm, eps
        The threat model; `eps` in pixel units of [0, 1], 0 or more.
    replays
        Steps on each batch, m of the paper, 1 or more.
    step_size
        Length of a step of the perturbation in the norm, in pixel units; `eps` where not given.
    """

    norm: Norm = Norm.linf
    eps: float = 8 / 255
    replays: int = 8
    step_size: float | None = None

    def __post_init__(self) -> None:
        ranges.at_least(0, eps=self.eps)
        ranges.at_least(1, replays=self.replays)
        if self.step_size is not None:
            ranges.above(0, step_size=self.step_size)
        self._delta: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """The perturbation that the next batch starts from."""
        return {"delta": self._delta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._delta = state["delta"]

    def inner(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator
    ) -> Tensor:
        """x + d where the batch before has left d, a leaf that requires gradients."""
        self._delta = self._long_enough(x)
        x_adv = ball(self.threat).project(x + self._delta[: len(x)], x)
        return x_adv.detach().requires_grad_()

    def outer(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, loss: Loss
    ) -> Objective:
        """The loss at x + d, whose gradient will be that of this computation alone."""
        x_adv.grad = None
        logits = model(x_adv)
        return Objective(loss(logits, y).mean(), adversarial=logits)

    def advance(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """x + d a step further along the gradient that the backward pass has left at `x_adv`."""
        assert self._delta is not None, "advance comes after inner"
        assert x_adv.grad is not None, "advance comes after a backward pass"
        threat, step = ball(self.threat), self.eps
        if self.step_size is not None:
            step = self.step_size
        slope, start = x_adv.grad.nan_to_num(0, 0, 0), x_adv.detach()
        x_adv = threat.project(start + step * threat.ascent(slope, start), x)
        self._delta[: len(x)] = x_adv - x
        return x_adv.detach().requires_grad_()

    def _long_enough(self, x: Tensor) -> Tensor:
        """What is kept, with zeros for images beyond the longest batch so far."""
        kept = torch.zeros_like(x[:0]) if self._delta is None else self._delta.to(x.device)
        missing = max(0, len(x) - len(kept))
        return torch.cat([kept, torch.zeros_like(x[:missing])])
