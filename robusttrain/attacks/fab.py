"""Fast adaptive boundary attack, for minimal perturbations (Croce and Hein 2020)."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from robusttrain import ranges
from robusttrain.attacks import StepsField, Traits
from robusttrain.attacks.attack_loss import AttackLoss
from robusttrain.attacks.ball_attack import BallAttack
from robusttrain.attacks.objectives import (
    AttackObjective,
    check_targets,
    fitted_targets,
    targeted_losses,
)
from robusttrain.attacks.search_state import BestPoints, PerImageState, remaining_indices
from robusttrain.threat import Norm
from robusttrain.threat.balls import per_image

# Below this the way to the boundary has no length to compare.
SHORTEST = 1e-8

# Share of the steps after which a search ends, if its smallest success is that much above eps.
GIVE_UP = ((0.2, 1.3), (0.35, 1.15), (0.6, 1.05))


@dataclass
class FAB(StepsField, BallAttack):
    """Steps to the linearised decision boundary, drawn towards the image (Algorithm 1).

    With d and d_0 the shortest ways from x_t and from x to the plane where the linearised margin is
    zero, within the box, and alpha = min(|d| / (|d| + |d_0|), alpha_max): x_{t+1} =
    clip((1 - alpha) (x_t + eta d) + alpha (x + eta d_0)); from a point that fools the model it goes
    back to x + beta (x_{t+1} - x). A step takes two forward passes and one backward pass.

    Without targets the margin over the best other class is linearised, where the paper looks for
    the nearest plane of all classes by a backward pass each; with `targets` (FAB-T) the lead of
    each of these classes in turn.

    Parameters
    ----------
    targets
        How many classes to aim at, in the order of their logits at the clean image; where not
        given, the attack just leads away from the label.
    steps
        Steps a search, 1 or more.
    restarts
        Searches for each target, 1 or more; all but the first start at a random point.
    alpha_max, eta, beta
        Largest pull towards the image, overshoot over the boundary, and share of the way that is
        kept after a success: in [0, 1], 1 or more, and in ]0, 1[.
    give_up
        Whether a search ends that is far from the ball: after 20, 35 and 60 % of its steps, if its
        smallest success is still larger than 1.3, 1.15 and 1.05 eps. Where not given, in linf only:
        there few searches shrink as much as that in the steps that remain, while in l2, on a
        network trained for linf, it was seen to cost 2 of 100 images.
    minimal
        Look for the smallest perturbation to the last step, instead of letting an image go as
        soon as one is within the ball.
    """

    targets: int | None = None
    steps: int = 100
    restarts: int = 1
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    give_up: bool | None = None
    minimal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_targets(self.targets, self.label)
        ranges.at_least(1, steps=self.steps, restarts=self.restarts, eta=self.eta)
        ranges.within(0, 1, alpha_max=self.alpha_max)
        ranges.inside(0, 1, beta=self.beta)
        if self.give_up is None:
            self.give_up = self.norm is Norm.linf

    def unused(self) -> dict[str, str]:
        """`give_up`, if searches go on to their last step."""
        return {"give_up": "minimal"} if self.minimal else {}

    def fitted(self, num_classes: int) -> Self:
        """The same attack, with no more targets than there are other classes."""
        return replace(self, targets=fitted_targets(self.targets, num_classes))

    @property
    def traits(self) -> Traits:
        """What kind of an attack it is."""
        return replace(super().traits, walks_boundary=True, own_objective=True)

    def search(self, surrogate: AttackLoss, x: Tensor, generator: torch.Generator) -> Tensor:
        """The smallest perturbation that fools the model, cut to the ball."""
        best = BestPoints(x)
        for aimed in targeted_losses(surrogate, x, self.targets, AttackObjective.margin):
            for restart in range(self.restarts):
                start = self.ball.random_start(x, generator) if restart else x
                rows = torch.arange(len(x), device=x.device) if self.minimal else best.remaining
                if len(rows):
                    unknown = torch.full_like(x[rows].flatten(1)[:, 0], torch.inf)
                    search = _Search(rows, aimed.take(rows), x[rows], start[rows], unknown)
                    self._run(search, best)
        return self.ball.project(best.x_adv, x)

    def _run(self, search: "_Search", best: BestPoints) -> None:
        limits = self._limits
        for step in range(1, self.steps + 1):
            search.x_adv = self._step(search)
            fooled = search.surrogate.succeeded(search.surrogate.score(search.x_adv)[1])
            size = self.ball.norm(search.x_adv - search.x)
            within = fooled & (size <= self.eps)
            # Outside of the ball the smallest perturbation is kept as well, and cut in the end.
            best.offer(search.rows, search.x_adv, torch.where(fooled, -size, -torch.inf), within)
            back = search.x + self.beta * (search.x_adv - search.x)
            search.x_adv = torch.where(per_image(fooled, back), back, search.x_adv)
            search.smallest = torch.where(fooled, search.smallest.minimum(size), search.smallest)
            if not self.minimal:
                over = within | (search.smallest > limits.get(step, torch.inf))
                search = search.take(remaining_indices(over)) if bool(over.any()) else search
            if len(search.rows) == 0:
                return

    @property
    def _limits(self) -> dict[int, float]:
        """Largest perturbation allowed after each of these steps."""
        if not self.give_up:
            return {}
        return {max(1, round(share * self.steps)): size * self.eps for share, size in GIVE_UP}

    def _step(self, search: "_Search") -> Tensor:
        x, x_adv = search.x, search.x_adv
        seen = search.surrogate.evaluate(x_adv)
        lead = (seen.gradient * (x_adv - x)).flatten(1).sum(1)
        way = self.ball.shortest_way(seen.gradient, -seen.value, x_adv)
        way_from_x = self.ball.shortest_way(seen.gradient, lead - seen.value, x)
        length, length_from_x = (self.ball.norm(d).clamp_min(SHORTEST) for d in (way, way_from_x))
        alpha = per_image((length / (length + length_from_x)).clamp_max(self.alpha_max), x)
        there = (1 - alpha) * (x_adv + self.eta * way) + alpha * (x + self.eta * way_from_x)
        # Without a usable gradient there is no plane: go back half the way to the image.
        there = torch.where(per_image(seen.usable, x), there, (x_adv + x) / 2)
        return there.clamp(0, 1)


@dataclass
class _Search(PerImageState):
    rows: Tensor
    surrogate: AttackLoss
    x: Tensor
    x_adv: Tensor
    smallest: Tensor
