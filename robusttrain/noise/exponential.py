"""Exponential noise (Pinot et al. 2019)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from robusttrain.noise.additive import AdditiveNoise
from robusttrain.noise.layer import standard_laplace


@dataclass
class Exponential(AdditiveNoise):
    """x + noise of density exp(-z / sigma) / sigma for z >= 0: mean and standard deviation sigma.

    It is the only noise here that is never negative, so it also makes images brighter.
    """

    def sample(self, memory: Tensor, generator: torch.Generator) -> Tensor:
        """Exp(1 / sigma)."""
        return standard_laplace(memory, generator).abs_().mul_(self.sigma)
