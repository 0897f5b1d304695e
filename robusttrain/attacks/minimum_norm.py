"""What FMN and DDN share: steps that shorten, along the gradient in l2 whatever the norm is."""

import math

from torch import Tensor

from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball

# Only its directions are used.
_L2 = ball(Threat(Norm.l2, 0))


def annealed(first: float, last: float, step: int, steps: int) -> float:
    """The value in `step`, from 0 on, of a cosine from `first` to `last` over `steps`."""
    return last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2


def direction(gradient: Tensor) -> Tensor:
    """The gradient of each image, scaled to length 1 in l2."""
    return _L2.steepest(gradient)
