"""The l2 attack of Carlini and Wagner (2017), for minimal perturbations."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robusttrain import ranges
from robusttrain.attacks import StepsField, Traits
from robusttrain.attacks.attack_loss import AttackLoss
from robusttrain.attacks.ball_attack import BallAttack
from robusttrain.attacks.objectives import margin
from robusttrain.attacks.search_state import BestPoints, WeightSearch
from robusttrain.threat import Norm
from robusttrain.threat.balls import per_image

# tanh reaches 0 and 1, where many pixels are, only for an infinite w, and has no slope there. This
# much of its range moves no pixel by more than 5e-7 and leaves w and its slope finite.
RANGE = 1 - 1e-6


@dataclass
class CarliniWagner(StepsField, BallAttack):
    """argmin_w |delta|_2^2 + c * max(-m(x_adv), -confidence) with x_adv = (tanh(w) + 1) / 2.

    m is the lead of the best other class over the label or, for `label=least_likely`, of that class
    over all others (Carlini and Wagner 2017, section VI.A with f_6). Adam descends from x in every
    round of a search for the smallest c that fools the model: tenfold up or down until it is known
    from both sides, and by their geometric mean from then on. Each image has its own c and keeps
    the smallest perturbation of all rounds that fools the model, or else the point of highest m;
    what lies outside the ball is projected on it at the end. `loss` is not asked. Every round takes
    `steps` forward and backward passes.

    Parameters
    ----------
    norm
        l2, the norm that is minimised.
    c
        Weight of the lead in the first round, above 0.
    binary_steps
        Rounds of the search for c, 1 or more.
    steps
        Points a round, the image itself the first, 1 or more.
    lr
        Learning rate of Adam, in units of w, above 0.
    confidence
        Lead, in logits, that counts as fooling the model, 0 or more.
    """

    norm: Norm = Norm.l2
    c: float = 1e-2
    binary_steps: int = 9
    steps: int = 1000
    lr: float = 0.01
    confidence: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = "l2: the attack minimises the l2 norm"
        ranges.require(self.norm is Norm.l2, "norm", self.norm, allowed)
        ranges.above(0, c=self.c, lr=self.lr)
        ranges.at_least(1, binary_steps=self.binary_steps, steps=self.steps)
        ranges.at_least(0, confidence=self.confidence)

    @property
    def traits(self) -> Traits:
        """What kind of an attack it is."""
        return replace(super().traits, walks_boundary=True, own_objective=True)

    def search(self, surrogate: AttackLoss, x: Tensor, generator: torch.Generator) -> Tensor:
        """The smallest perturbation that fools the model, cut to the ball."""
        surrogate = replace(surrogate, loss=margin)
        best = BestPoints(x)
        c = WeightSearch(torch.full((len(x),), self.c, dtype=x.dtype, device=x.device))
        for _ in range(self.binary_steps):
            c.go_on(above=self._descend(surrogate, x, c.weight, best))
        return self.ball.project(best.x_adv, x)

    def _descend(self, surrogate: AttackLoss, x: Tensor, c: Tensor, best: BestPoints) -> Tensor:
        """One round, which offers all its points to `best`; returns which were fooled, (N,)."""
        w = torch.atanh((2 * x - 1) * RANGE)
        adam = torch.optim.Adam([w], lr=self.lr)
        rows, ever = torch.arange(len(x), device=x.device), torch.zeros_like(best.fooled)
        for _ in range(self.steps):
            tanh = w.tanh()
            x_adv = (tanh + 1) / 2
            delta, seen = x_adv - x, surrogate.evaluate(x_adv)
            # Non-finite outputs count as fooled, whatever their lead.
            below = seen.value < self.confidence
            fooled = surrogate.succeeded(seen.logits) & ~below
            rank = torch.where(fooled, -self.ball.norm(delta), seen.value)
            best.offer(rows, x_adv, rank, fooled)
            ever |= fooled
            # By hand: the chain ends at w, and the model's own gradient at x is all it needs.
            slope = 2 * delta - per_image(c * below, x) * seen.gradient
            w.grad = slope * (1 - tanh.square()) / 2
            adam.step()
        return ever
