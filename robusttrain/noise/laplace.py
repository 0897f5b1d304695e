"""Laplace noise (Pinot et al. 2019; Teng et al. 2020)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robusttrain.noise.additive import AdditiveNoise, Certificate
from robusttrain.noise.layer import standard_laplace
from robusttrain.threat import Norm


@dataclass
class Laplace(AdditiveNoise):
    """x + Laplace noise of scale sigma / sqrt 2, whose standard deviation is sigma."""

    @property
    def scale(self) -> float:
        """The scale b of the density exp(-|z| / b) / (2 b), which is the mean absolute value."""
        return self.sigma / math.sqrt(2)

    def sample(self, memory: Tensor, generator: torch.Generator) -> Tensor:
        """Density exp(-|z| / scale) / (2 scale)."""
        return standard_laplace(memory, generator).mul_(self.scale)

    @property
    def certificate(self) -> Certificate:
        """A certificate in l1."""
        return Certificate(Norm.l1, "Teng et al. 2020")

    def radius(self, probability: float) -> float:
        """-scale log(2 (1 - p)) for probability p, if the runner-up has 1 - p."""
        return -self.scale * math.log(2 * (1 - probability))
