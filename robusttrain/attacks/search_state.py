"""Images that are still standing: who is searched for on, and the best point found for each."""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass
class Rows:
    """Base of a search's state: every field has an entry for each image, and all are cut together.

    Fields are tensors (N, ...), know `take(rows)`, or are numbers that hold for every image.
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


class Best:
    """The best point of each image: the one of highest value that fools, or else of them all."""

    def __init__(self, x: Tensor) -> None:
        self.x_adv = x.clone()
        # Whatever is offered first is taken up: no value is smaller than one that is no number.
        self.value = torch.full((len(x),), torch.nan, dtype=x.dtype, device=x.device)
        self.fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    @property
    def standing(self) -> Tensor:
        """Positions of the images that no point has fooled yet."""
        return standing(self.fooled)

    def offer(self, rows: Tensor, x_adv: Tensor, value: Tensor, fooled: Tensor) -> None:
        """Take up points for the images at `rows`, where they are better."""
        # "not smaller" instead of "greater": a value that is not a number must not look worse.
        higher = ~(value <= self.value[rows])
        before = self.fooled[rows]
        better = (fooled & ~before) | (higher & (fooled == before))
        chosen = rows[better]
        self.x_adv[chosen] = x_adv[better]
        self.value[chosen] = value[better].to(self.value.dtype)
        self.fooled[chosen] = fooled[better]


def standing(fooled: Tensor) -> Tensor:
    """Positions where `fooled` (N,) does not hold."""
    return (~fooled).nonzero().squeeze(1)
