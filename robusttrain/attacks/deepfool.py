"""DeepFool, short ways over the nearest decision boundary (Moosavi-Dezfooli et al. 2016)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robusttrain import ranges
from robusttrain.attacks import StepsField, Traits
from robusttrain.attacks.attack_loss import AttackLoss
from robusttrain.attacks.ball_attack import BallAttack
from robusttrain.attacks.search_state import PerImageState, remaining_indices


@dataclass
class DeepFool(StepsField, BallAttack):
    """Steps over the nearest plane of the linearised model, until it is fooled (Algorithm 2).

    With f_k the lead of class k over the label and w_k its gradient, the plane f_k = 0 is
    |f_k| / |w_k|_dual away (section 3.3, for general norms), and x_{t+1} = x_t + (1 + overshoot) d
    with d the shortest way to the nearest of them within the box. What lies outside the ball at the
    end is projected on it. `label=least_likely` heads for that class instead, over the farthest of
    the planes behind which others lead it. `loss` is not asked.

    An image is done with once it is fooled. A step takes two forward passes and a backward pass for
    each of the `classes`, and ranking these one forward pass more.

    Parameters
    ----------
    steps
        Most steps, 1 or more.
    classes
        Other classes that are looked at, those with the largest logits at x, 1 or more; all where
        the model has fewer.
    overshoot
        How much farther than to the plane a step leads, as a share of the way, 0 or more.
    """

    steps: int = 50
    classes: int = 9
    overshoot: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.at_least(1, steps=self.steps, classes=self.classes)
        ranges.at_least(0, overshoot=self.overshoot)

    @property
    def traits(self) -> Traits:
        """What kind of an attack it is."""
        return replace(super().traits, walks_boundary=True, own_objective=True)

    def search(self, surrogate: AttackLoss, x: Tensor, generator: torch.Generator) -> Tensor:
        """The first point that fools the model, cut to the ball."""
        _, logits = surrogate.score(x)
        count = min(self.classes, logits.shape[1] - 1)
        rivals = logits.scatter(1, surrogate.labels[:, None], -torch.inf).topk(count, dim=1).indices
        rows = remaining_indices(surrogate.succeeded(logits))
        walk = _Walk(rows, surrogate.take(rows), x[rows], rivals[rows])
        end = x.clone()
        for _ in range(self.steps):
            if len(walk.rows) == 0:
                break
            walk.x_adv = self._step(walk)
            end[walk.rows] = walk.x_adv
            _, logits = walk.surrogate.score(walk.x_adv)
            walk = walk.take(remaining_indices(walk.surrogate.succeeded(logits)))
        return self.ball.project(end, x)

    def _step(self, walk: "_Walk") -> Tensor:
        leads, slopes = walk.surrogate.jacobian(walk.x_adv, walk.leads)
        steepness = self.ball.dual_norm(slopes.flatten(0, 1)).view_as(leads)
        moves = slopes.flatten(2).any(2)
        # A lead that does not move with the input cannot be changed.
        if walk.surrogate.targeted:
            chosen = torch.where(moves, leads / steepness, -torch.inf).argmax(1)
        else:
            chosen = torch.where(moves, -leads / steepness, torch.inf).argmin(1)
        each = torch.arange(len(leads), device=leads.device)
        way = self.ball.shortest_way(slopes[each, chosen], -leads[each, chosen], walk.x_adv)
        return (walk.x_adv + (1 + self.overshoot) * way).clamp(0, 1)


@dataclass
class _Walk(PerImageState):
    """A search under way; `rivals` (N, M) are the other classes."""

    rows: Tensor
    surrogate: AttackLoss
    x_adv: Tensor
    rivals: Tensor

    def leads(self, logits: Tensor, part: slice) -> Tensor:
        """The leads of the rivals over the label, (n, M)."""
        own = logits.gather(1, self.surrogate.labels[part, None])
        return logits.gather(1, self.rivals[part]) - own
