"""What searches keep for each image: whether it is fooled, its best point, its best weight."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass
class PerImageState:
    """Base of a search's state, whose fields all have an entry for each image.

    Fields are tensors (N, ...), objects with a method `take(rows)`, or numbers that hold for every
    image.
    """

    def take(self, rows: Tensor) -> Self:
        """The state of some of the images."""
        cut = {}
        for member in fields(self):
            value = getattr(self, member.name)
            if isinstance(value, Tensor):
                value = value[rows]
            elif not isinstance(value, float):
                value = value.take(rows)
            cut[member.name] = value
        return type(self)(**cut)


class BestPoints:
    """The best point of each image: of those that fool the model, or else of all, the highest."""

    def __init__(self, x: Tensor) -> None:
        self.x_adv = x.clone()
        # NaN, so that the first point is taken whatever its value is.
        self.value = torch.full((len(x),), torch.nan, dtype=x.dtype, device=x.device)
        self.fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    @property
    def remaining(self) -> Tensor:
        """Positions of the images that no point has fooled yet."""
        return remaining_indices(self.fooled)

    def offer(self, rows: Tensor, x_adv: Tensor, value: Tensor, fooled: Tensor) -> None:
        """Take the points for the images at `rows` that are better."""
        # "not smaller" instead of "greater": a value that is not a number must not look worse.
        higher = ~(value <= self.value[rows])
        before = self.fooled[rows]
        better = (fooled & ~before) | (higher & (fooled == before))
        chosen = rows[better]
        self.x_adv[chosen] = x_adv[better]
        self.value[chosen] = value[better].to(self.value.dtype)
        self.fooled[chosen] = fooled[better]


def highest(points: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Of several points for each image, the one of the highest value, (N, ...).

    Parameters
    ----------
    points
        Tensors (N, ...).
    values
        The value (N,) of each. One that is not a number counts as the highest.
    """
    best = torch.stack([*values]).argmax(0)
    return torch.stack([*points])[best, torch.arange(len(best), device=best.device)]


# What a weight is multiplied or divided by until its threshold is known from both sides.
WEIGHT_FACTOR = 10.0


class WeightSearch:
    """For each image, the weight at which the outcome of a search turns.

    It moves tenfold up or down until the threshold is known from both sides, and to the geometric
    mean of the two sides from then on.

    Parameters
    ----------
    weight
        The weights of the first round, (N,).
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._below, self._above = torch.zeros_like(weight), torch.full_like(weight, torch.inf)

    def go_on(self, above: Tensor) -> None:
        """Choose the next weights; `above` (N,) says where the present ones are too large."""
        self._below = torch.where(above, self._below, self.weight)
        self._above = torch.where(above, self.weight, self._above)
        bounded = self._above.isfinite()
        far = torch.where(bounded, self.weight / WEIGHT_FACTOR, self.weight * WEIGHT_FACTOR)
        between = (self._below * self._above).sqrt()
        self.weight = torch.where((self._below > 0) & bounded, between, far)


def remaining_indices(fooled: Tensor) -> Tensor:
    """Positions where `fooled` (N,) does not hold."""
    return (~fooled).nonzero().squeeze(1)
