"""Training without a defense, the baseline."""

from dataclasses import dataclass

from torch import Tensor, nn

from robusttrain.attacks import Loss, NoThreat
from robusttrain.defenses import Defense, Objective


@dataclass
class Standard(NoThreat, Defense):
    """min E[ L(f(x), y) ]. One forward and one backward pass."""

    def outer(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, loss: Loss
    ) -> Objective:
        """The loss at the clean images."""
        logits = model(x)
        return Objective(loss(logits, y).mean(), clean=logits)
