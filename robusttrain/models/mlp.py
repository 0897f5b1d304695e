"""Fully connected networks."""

import math
from dataclasses import dataclass, field
from itertools import pairwise

from torch import nn

from robusttrain import ranges


@dataclass
class MLP:
    """Affine layers with ReLU between them.

    Parameters
    ----------
    widths
        Sizes of the hidden layers, each 1 or more; may be empty.
    """

    widths: list[int] = field(default_factory=lambda: [256, 256])

    def __post_init__(self) -> None:
        ok = all(width >= 1 for width in self.widths)
        ranges.require(ok, "widths", self.widths, "a list of whole numbers, each 1 or more")

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten(1)]
        sizes = [math.prod(image_shape), *self.widths]
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))
