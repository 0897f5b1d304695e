"""Symmetric Weibull noise (Pinot et al. 2019)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robusttrain import ranges
from robusttrain.noise.additive import AdditiveNoise
from robusttrain.noise.layer import standard_laplace


@dataclass
class Weibull(AdditiveNoise):
    """x + s z, s a random sign and z a Weibull variable, scaled to the standard deviation sigma.

    Parameters
    ----------
    shape
        The exponent k of the density k z^(k - 1) exp(-z^k), above 0; 3 in the paper. With 1 it is
        Laplace noise.
    """

    shape: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.above(0, shape=self.shape)

    def sample(self, memory: Tensor, generator: torch.Generator) -> Tensor:
        """Fill `memory` with roots of exponential noise, with random signs."""
        signed = standard_laplace(memory, generator)
        sizes = signed.abs().pow_(1 / self.shape)
        # E[z^2] = Gamma(1 + 2 / k).
        scale = self.sigma / math.sqrt(math.gamma(1 + 2 / self.shape))
        return torch.copysign(sizes, signed, out=memory).mul_(scale)
