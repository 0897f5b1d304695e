"""A smoothed classifier around any trained model (Cohen, Rosenfeld and Kolter 2019)."""

from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.noise.additive import AdditiveLayer, AdditiveNoise
from robusttrain.noise.gaussian import Gaussian
from robusttrain.noise.laplace import Laplace
from robusttrain.noise.layer import Vote
from robusttrain.noise.placement import INPUT, put
from robusttrain.noise.uniform import UniformNoise


class Distribution(StrEnum):
    """Distributions with a certificate: Gaussian noise in l2, the others in l1."""

    gaussian = "gaussian"
    laplace = "laplace"
    uniform = "uniform"


NOISES: dict[Distribution, type[AdditiveNoise]] = {
    Distribution.gaussian: Gaussian,
    Distribution.laplace: Laplace,
    Distribution.uniform: UniformNoise,
}


@dataclass
class Smoothing(AdditiveNoise):
    """g(x) = argmax_c P(f(x + noise) = c), by the vote of many draws (PREDICT, Cohen et al. 2019).

    The classifier abstains if the two classes with the most votes could be tied, by a binomial test
    at level `alpha`; that counts as wrong. The model may be trained with any noise or none.
    `evaluation=certify` computes certified radii (CERTIFY).

    Parameters
    ----------
    distribution
        The noise, at the input.
    alpha
        Probability that a vote returns another class than g, in ]0, 1[.
    """

    distribution: Distribution = Distribution.gaussian
    alpha: float = 0.001
    train: bool = field(default=False, kw_only=True)
    predict: bool = field(default=True, kw_only=True)
    vote: Vote = field(default=Vote.majority, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.inside(0, 1, alpha=self.alpha)
        ranges.one_of(list(Distribution), distribution=self.distribution)
        ranges.require(self.at == INPUT, "at", self.at, "input: nothing is known of other places")

    @property
    def _noise(self) -> AdditiveNoise:
        return NOISES[Distribution(self.distribution)](self.sigma, draws=self.draws)

    def sample(self, memory: Tensor, generator: torch.Generator) -> Tensor:
        """Fill `memory` with noise of the distribution."""
        return self._noise.sample(memory, generator)

    def install(self, model: nn.Module, seed: int) -> None:
        """Add the noise at the input of `model`."""
        layer = AdditiveLayer(self._noise, self, seed)
        layer.alpha = self.alpha
        put(layer, model, self.at)
