"""The perturbation of learning with a strong adversary, Algorithm 1 (Huang et al. 2016)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robusttrain.attacks import Traits
from robusttrain.attacks.attack_loss import AttackLoss
from robusttrain.attacks.ball_attack import BallAttack


@dataclass
class SoftmaxLinearisation(BallAttack):
    """The shortest way to another class of the linearised softmax output, made `eps` long.

    With a = softmax(f(x)) and H its Jacobian in x, the class j is reached at distance
    (a_y - a_j) / |H_j - H_y|_dual along the steepest direction of H_j - H_y (Huang et al. 2016,
    Algorithm 1). One forward pass and K backward passes for K classes. `label=least_likely` heads
    for that class instead, away from the rival that leads it by the largest distance. It has a
    direction of its own, and `loss` is not asked.
    """

    @property
    def traits(self) -> Traits:
        """What kind of an attack it is."""
        return replace(super().traits, own_objective=True)

    def search(self, surrogate: AttackLoss, x: Tensor, generator: torch.Generator) -> Tensor:
        """The point at distance `eps` on that way, within the box."""
        outputs, jacobian = surrogate.jacobian(x, lambda logits, _: logits.softmax(1))
        rows = torch.arange(len(x), device=x.device)
        own = surrogate.labels
        slopes = jacobian - jacobian[rows, own].unsqueeze(1)
        gaps = outputs[rows, own].unsqueeze(1) - outputs
        steepness = self.ball.dual_norm(slopes.flatten(0, 1)).view_as(gaps)
        # A class whose output does not move with the input cannot be reached.
        distance = torch.where(steepness > 0, gaps / steepness, torch.inf)
        distance[rows, own] = torch.inf
        nearest = slopes[rows, distance.argmin(1)]
        return self.ball.linear_maximiser(-nearest if surrogate.targeted else nearest, x)
