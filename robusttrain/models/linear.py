"""Softmax regression, whose adversarial examples are known in closed form."""

import math
from dataclasses import dataclass

from torch import nn


@dataclass
class Linear:
    """One affine layer from the pixels to the logits."""

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        return nn.Sequential(nn.Flatten(1), nn.Linear(math.prod(image_shape), num_classes))
