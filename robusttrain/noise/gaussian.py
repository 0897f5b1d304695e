"""Gaussian noise (Cohen, Rosenfeld and Kolter 2019)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from robusttrain.noise.additive import AdditiveNoise, Certificate
from robusttrain.threat import Norm


@dataclass
class Gaussian(AdditiveNoise):
    """x + sigma N(0, I): Gaussian augmentation in training (Cohen et al. 2019, section 3.3)."""

    def sample(self, memory: Tensor, generator: torch.Generator) -> Tensor:
        """N(0, sigma^2)."""
        return memory.normal_(0, self.sigma, generator=generator)

    @property
    def certificate(self) -> Certificate:
        """A certificate in l2."""
        return Certificate(Norm.l2, "Cohen et al. 2019, theorem 1")

    def radius(self, probability: float) -> float:
        """Sigma Phi^-1(p) for probability p, if the runner-up has 1 - p."""
        # Imported here, since only certificates need it and it takes long.
        from scipy.special import ndtri

        return float(self.sigma * ndtri(probability))
