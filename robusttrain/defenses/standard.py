"""Training without a defense, the baseline."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robusttrain.attacks import Loss, NoThreat
from robusttrain.defenses import Objective, repeatable


@dataclass
class Standard(NoThreat):
    """min E[ L(f(x), y) ]. One forward and one backward pass."""

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, loss: Loss, generator: torch.Generator
    ) -> Iterator[Objective]:
        """The loss at the clean images."""

        def objective() -> Objective:
            logits = model(x)
            return Objective(loss(logits, y).mean(), clean=logits)

        yield repeatable(objective)
