"""Uniform noise (Lee et al. 2019; Yang et al. 2020)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robusttrain.noise.additive import AdditiveNoise, Certificate
from robusttrain.threat import Norm


@dataclass
class UniformNoise(AdditiveNoise):
    """x + U(-a, a) with a = sqrt 3 sigma, whose standard deviation is sigma."""

    @property
    def half_width(self) -> float:
        """The largest absolute value."""
        return math.sqrt(3) * self.sigma

    def sample(self, memory: Tensor, generator: torch.Generator) -> Tensor:
        """U(-a, a)."""
        return memory.uniform_(-self.half_width, self.half_width, generator=generator)

    @property
    def certificate(self) -> Certificate:
        """A certificate in l1."""
        return Certificate(Norm.l1, "Yang et al. 2020")

    def radius(self, probability: float) -> float:
        """2 a (p - 1/2) for probability p, if the runner-up has 1 - p."""
        return 2 * self.half_width * (probability - 0.5)
