"""Defenses: the outer objective, that is, which loss is descended at which points.

A defense is called for each batch and yields the objectives to descend, one optimiser step each:

    for objective in defense(model, x, y, loss=loss, generator=generator):
        optimizer.zero_grad()
        objective.loss.backward()
        optimizer.step()

The model comes in train mode. Most defenses yield once; one that replays a batch yields each time.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from robusttrain.attacks import Loss


class Objective(NamedTuple):
    """What is descended, and the logits that its computation gave anyway.

    Parameters
    ----------
    loss
        A scalar with a graph to the parameters.
    clean, adversarial
        Logits (N, K) at the clean and at the adversarial images, where they were computed; the
        progress display and `train.csv` take their accuracies from them.
    """

    loss: Tensor
    clean: Tensor | None = None
    adversarial: Tensor | None = None


class Defense(Protocol):
    """What every defense can be called as."""

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, loss: Loss, generator: torch.Generator
    ) -> Iterator[Objective]:
        """The objectives for images `x` (N, C, H, W) in [0, 1] and labels `y` (N,)."""
