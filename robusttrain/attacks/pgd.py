"""Projected gradient descent on the negative loss (Madry et al. 2018)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from robusttrain import ranges
from robusttrain.attacks.crafting import BallAttack, Surrogate


@dataclass
class PGD(BallAttack):
    """x_{t+1} = project(x_t + step_size * steepest(grad_x L(f(x_t), y))), Madry et al. 2018, eq. 2.

    With `restarts=1` and without `keep_best` it costs `steps` forward and `steps` backward passes
    and returns the last iterate. Otherwise every iterate is scored, the last one included, by one
    more forward pass a restart: an image keeps the iterate of highest loss among those that fool
    the model, or else among all, and takes no part in later restarts once it is fooled.

    In l1 a step moves 1 % of the pixels (SLIDE, Tramer and Boneh 2019), and the projection is exact
    for the intersection of ball and box (Croce and Hein 2021).

    Parameters
    ----------
    steps
        Gradient steps a restart, 1 or more.
    step_size
        Length of a step in the norm, in pixel units; 2.5 * eps / steps where not given.
    random_start
        Start from a random point of S(x) instead of x.
    restarts
        Independent searches, 1 or more.
    keep_best
        Score every iterate, also with a single restart.
    """

    steps: int = 10
    step_size: float | None = None
    random_start: bool = True
    restarts: int = 1
    keep_best: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.at_least(1, steps=self.steps, restarts=self.restarts)
        ranges.require(
            self.random_start or self.restarts == 1,
            "restarts",
            self.restarts,
            "1 when random_start=false: all restarts would be the same search",
        )
        if self.step_size is not None:
            ranges.above(0, step_size=self.step_size)

    def search(self, surrogate: Surrogate, x: Tensor, generator: torch.Generator) -> Tensor:
        """The last iterate, or the best one of all restarts."""
        if self.restarts == 1 and not self.keep_best:
            return self._climb(surrogate, x, generator, None)
        best = _Best(x)
        rows = torch.arange(len(x), device=x.device)
        for _ in range(self.restarts):
            part = surrogate.take(rows)
            record = _Record(best, part, rows)
            last = self._climb(part, x[rows], generator, record)
            record(last, *part.score(last))
            rows = rows[~best.fooled[rows]]
            if len(rows) == 0:
                break
        return best.x_adv

    def _climb(
        self,
        surrogate: Surrogate,
        x: Tensor,
        generator: torch.Generator,
        record: "_Record | None",
    ) -> Tensor:
        step = 2.5 * self.eps / self.steps if self.step_size is None else self.step_size
        x_adv = self.ball.random_start(x, generator) if self.random_start else x
        for _ in range(self.steps):
            gradient, value, logits = surrogate.evaluate(x_adv)
            if record is not None:
                record(x_adv, value, logits)
            direction = self.ball.ascent(gradient, x_adv)
            x_adv = self.ball.project(x_adv + step * direction, x)
        return x_adv


class _Best:
    """The best point found so far for each image of a batch."""

    def __init__(self, x: Tensor) -> None:
        self.x_adv = x.clone()
        self.value = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
        self.fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)


class _Record:
    """Offers iterates for some rows of a batch to its `_Best`."""

    def __init__(self, best: _Best, surrogate: Surrogate, rows: Tensor) -> None:
        self.best, self.surrogate, self.rows = best, surrogate, rows

    def __call__(self, x_adv: Tensor, value: Tensor, logits: Tensor) -> None:
        best, rows = self.best, self.rows
        fooled = self.surrogate.succeeded(logits)
        # "not smaller" instead of "greater": a loss that is not a number must not look worse.
        higher = ~(value <= best.value[rows])
        better = (fooled & ~best.fooled[rows]) | (higher & (fooled == best.fooled[rows]))
        chosen = rows[better]
        best.x_adv[chosen] = x_adv[better]
        best.value[chosen] = value[better].to(best.value.dtype)
        best.fooled[chosen] = fooled[better]
