"""Random noise of the same radius, the control that every gradient attack has to beat."""

from dataclasses import dataclass

import torch
from torch import Tensor

from robusttrain.attacks.attack_loss import AttackLoss
from robusttrain.attacks.ball_attack import BallAttack


@dataclass
class Uniform(BallAttack):
    """One point drawn uniformly from the ball, cut with the box; no gradient, no search."""

    def unused(self) -> dict[str, str]:
        """The fields about the model, which it does not ask."""
        return {"label": "", "mode": ""}

    def search(self, surrogate: AttackLoss, x: Tensor, generator: torch.Generator) -> Tensor:
        """A random point of S(x)."""
        return self.ball.random_start(x, generator)
