"""Decoupled direction and norm, for minimal perturbations in l2 (Rony et al. 2019)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robusttrain import ranges
from robusttrain.attacks import StepsField, Traits
from robusttrain.attacks.attack_loss import AttackLoss
from robusttrain.attacks.ball_attack import BallAttack
from robusttrain.attacks.minimum_norm import annealed, direction
from robusttrain.attacks.search_state import BestPoints
from robusttrain.threat import Norm
from robusttrain.threat.balls import TINY, per_image

# The share of `lr` in the last step.
LAST_RATE = 0.01


@dataclass
class DDN(StepsField, BallAttack):
    """Steps along the gradient, scaled to a norm that moves to the boundary (Algorithm 1).

    With g the gradient of the loss, delta goes along g / |g|_2, and is then scaled to the norm r
    within the box. Where the model is fooled, r = (1 - gamma) r, and (1 + gamma) r elsewhere. The
    length of steps falls as a cosine. The smallest perturbation that fools the model is kept, or
    else the point of the highest loss; what lies outside the ball of `eps` is projected on it at
    the end. A step takes a forward and a backward pass.

    Parameters
    ----------
    norm
        l2, the norm that is minimised.
    steps
        Points, the image itself the first, 1 or more.
    lr
        Length of the first step, above 0.
    gamma
        Share by which the norm moves in each step, between 0 and 1.
    first_norm
        The norm after the first step, above 0.
    """

    norm: Norm = Norm.l2
    steps: int = 100
    lr: float = 1.0
    gamma: float = 0.05
    first_norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = "l2: the attack minimises the l2 norm"
        ranges.require(self.norm is Norm.l2, "norm", self.norm, allowed)
        ranges.at_least(1, steps=self.steps)
        ranges.above(0, lr=self.lr, first_norm=self.first_norm)
        ranges.inside(0, 1, gamma=self.gamma)

    @property
    def traits(self) -> Traits:
        """What kind of an attack it is."""
        return replace(super().traits, walks_boundary=True, starts_at_image=True)

    def search(self, surrogate: AttackLoss, x: Tensor, generator: torch.Generator) -> Tensor:
        """The smallest perturbation that fools the model, cut to the ball."""
        best, rows = BestPoints(x), torch.arange(len(x), device=x.device)
        x_adv, norm = x, torch.full((len(x),), self.first_norm, dtype=x.dtype, device=x.device)
        for step in range(self.steps):
            seen, size = surrogate.evaluate(x_adv), self.ball.norm(x_adv - x)
            fooled = surrogate.succeeded(seen.logits)
            best.offer(rows, x_adv, torch.where(fooled, -size, seen.value), fooled)
            if step > 0:
                norm = norm * torch.where(fooled, 1 - self.gamma, 1 + self.gamma)
            rate = annealed(self.lr, LAST_RATE * self.lr, step, self.steps)
            delta = x_adv - x + rate * direction(seen.gradient)
            scale = norm / self.ball.norm(delta).clamp_min(TINY)
            x_adv = (x + delta * per_image(scale, x)).clamp(0, 1)
        return self.ball.project(best.x_adv, x)
