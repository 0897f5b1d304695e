"""Box-constrained L-BFGS (Szegedy et al. 2014), the attack that named adversarial examples."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robusttrain import ranges
from robusttrain.attacks import StepsField
from robusttrain.attacks.attack_loss import AttackLoss
from robusttrain.attacks.ball_attack import BallAttack
from robusttrain.attacks.search_state import BestPoints, WeightSearch


@dataclass
class LBFGS(StepsField, BallAttack):
    """argmin_r c |r|_2^2 - loss(f(x + r), y) over x + r in the box (Szegedy et al. 2014, sec. 4.1).

    The images of a batch are independent terms of one problem that SciPy's L-BFGS-B solves, with
    the linf ball of radius `eps`, which holds the l2 and l1 balls, as part of its bounds; what lies
    outside the ball of `norm` is projected on it at the end. A search over c looks for the smallest
    perturbation that fools the model: c grows tenfold for an image that was fooled and shrinks
    tenfold for one that was not; once it is known from both sides, their geometric mean is next.
    `label=least_likely` is the targeted form of the paper.

    Parameters
    ----------
    c
        Weight of the size of the perturbation in the first round, 0 or more.
    steps
        Iterations of L-BFGS a round, 1 or more; each costs one or a few forward and backward
        passes.
    rounds
        Rounds of the search over c, 1 or more.
    """

    c: float = 0.01
    steps: int = 10
    rounds: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.at_least(0, c=self.c)
        ranges.at_least(1, steps=self.steps, rounds=self.rounds)

    def search(self, surrogate: AttackLoss, x: Tensor, generator: torch.Generator) -> Tensor:
        """The smallest perturbation that fools the model, or the one of highest loss."""
        c = WeightSearch(torch.full((len(x),), self.c, dtype=x.dtype, device=x.device))
        best, rows = BestPoints(x), torch.arange(len(x), device=x.device)
        for _ in range(self.rounds):
            x_adv = self.ball.project(self._solve(surrogate, x, c.weight), x)
            value, logits = surrogate.score(x_adv)
            fooled = surrogate.succeeded(logits)
            rank = _rank(fooled, value, (x_adv - x).flatten(1).norm(dim=1))
            best.offer(rows, x_adv, rank, fooled)
            # The weight is that of the size: too much of it lets nothing fool.
            c.go_on(above=~fooled)
        return best.x_adv

    def _solve(self, surrogate: AttackLoss, x: Tensor, weights: Tensor) -> Tensor:
        def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            point = torch.tensor(flat, dtype=x.dtype, device=x.device).view_as(x)
            seen = surrogate.evaluate(point)
            delta = (point - x).flatten(1)
            penalty = (weights * delta.square().sum(1)).sum()
            slope = 2 * weights[:, None] * delta - seen.gradient.flatten(1)
            # One image whose loss is not a number must not end the search of the others.
            gain = seen.value.nan_to_num(0, 0, 0).sum()
            return float(penalty - gain), _as_numpy(slope)

        # Imported here, since only this attack needs it and it takes half a second.
        from scipy.optimize import Bounds, minimize

        bounds = Bounds(
            _as_numpy((x - self.eps).clamp(0, 1)), _as_numpy((x + self.eps).clamp(0, 1))
        )
        found = minimize(
            objective,
            _as_numpy(x),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": self.steps},
        )
        return torch.tensor(found.x, dtype=x.dtype, device=x.device).view_as(x)


def _rank(fooled: Tensor, value: Tensor, size: Tensor) -> Tensor:
    """Fooled beats not fooled; among fooled the smaller, among the others the higher loss."""
    bounded = torch.sigmoid(value.nan_to_num(nan=torch.inf))
    return torch.where(fooled, 2 + 1 / (1 + size), bounded)


def _as_numpy(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().flatten().double().cpu().numpy()
