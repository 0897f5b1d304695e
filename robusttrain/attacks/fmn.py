"""Fast minimum-norm attack, for minimal perturbations in any norm (Pintor et al. 2021)."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from robusttrain import ranges
from robusttrain.attacks import StepsField, Traits
from robusttrain.attacks.attack_loss import AttackLoss
from robusttrain.attacks.ball_attack import BallAttack
from robusttrain.attacks.minimum_norm import annealed, direction
from robusttrain.attacks.objectives import (
    AttackObjective,
    check_targets,
    fitted_targets,
    targeted_losses,
)
from robusttrain.attacks.search_state import BestPoints
from robusttrain.threat.balls import TINY

# Shares of `lr` and of `gamma` in the last step.
LAST_RATE, LAST_GAMMA = 0.01, 0.02


@dataclass
class FMN(StepsField, BallAttack):
    """Steps along the gradient, projected on a ball whose radius moves to the boundary (Alg. 1).

    With m the lead of the best other class over the label, delta goes along grad m / |grad m|_2 and
    is projected on the ball of radius r within the box. Where the model is fooled,
    r = min((1 - gamma) r, smallest size that fooled it). Elsewhere r = (1 + gamma) r. As long as
    nothing has fooled it, r = (1 + gamma) max(r, |delta| - m / |grad m|_dual), a little farther
    than the linearised boundary; the paper goes up to it, where a linear model is not yet fooled.
    The length of steps and gamma fall as a cosine. What lies outside the ball of `eps` at the end
    is projected on it. `loss` is not asked. A step takes a forward and a backward pass.

    Parameters
    ----------
    targets
        How many classes to aim at in turn, in the order of their logits at the clean image. Where
        not given, the attack just leads away from the label.
    steps
        Points for each target, the image itself the first, 1 or more.
    lr
        Length of the first step in l2, above 0.
    gamma
        Share by which the radius moves in the first step, between 0 and 1.
    """

    targets: int | None = None
    steps: int = 100
    lr: float = 1.0
    gamma: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_targets(self.targets, self.label)
        ranges.at_least(1, steps=self.steps)
        ranges.above(0, lr=self.lr)
        ranges.inside(0, 1, gamma=self.gamma)

    @property
    def traits(self) -> Traits:
        """What kind of an attack it is."""
        return replace(super().traits, walks_boundary=True, own_objective=True)

    def fitted(self, num_classes: int) -> Self:
        """The same attack, with no more targets than there are other classes."""
        return replace(self, targets=fitted_targets(self.targets, num_classes))

    def search(self, surrogate: AttackLoss, x: Tensor, generator: torch.Generator) -> Tensor:
        """The smallest perturbation that fools the model, cut to the ball."""
        best = BestPoints(x)
        for aimed in targeted_losses(surrogate, x, self.targets, AttackObjective.margin):
            self._descend(aimed, x, best)
        return self.ball.project(best.x_adv, x)

    def _descend(self, surrogate: AttackLoss, x: Tensor, best: BestPoints) -> None:
        """Offer all points of a search to `best`."""
        rows = torch.arange(len(x), device=x.device)
        smallest = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        x_adv, radius = x, torch.zeros_like(smallest)
        for step in range(self.steps):
            seen, size = surrogate.evaluate(x_adv), self.ball.norm(x_adv - x)
            fooled = surrogate.succeeded(seen.logits)
            best.offer(rows, x_adv, torch.where(fooled, -size, seen.value), fooled)
            smallest = torch.where(fooled, smallest.minimum(size), smallest)
            gamma = annealed(self.gamma, LAST_GAMMA * self.gamma, step, self.steps)
            ahead = -seen.value / self.ball.dual_norm(seen.gradient).clamp_min(TINY)
            there = torch.where(smallest.isinf(), radius.maximum(size + ahead), radius)
            nearer = ((1 - gamma) * radius).minimum(smallest)
            radius = torch.where(fooled, nearer, (1 + gamma) * there)
            rate = annealed(self.lr, LAST_RATE * self.lr, step, self.steps)
            x_adv = self.ball.project_each(x_adv + rate * direction(seen.gradient), x, radius)
