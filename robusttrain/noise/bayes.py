"""Mean-field Gaussian weights, as in Adv-BNN (Liu et al. 2019)."""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robusttrain import ranges
from robusttrain.noise.layer import NoiseLayer, Progress, Switches, standard_normal, untraced
from robusttrain.noise.placement import layers_for
from robusttrain.seeding import derived_seed


@dataclass
class Bayes(Switches):
    """Weights w ~ N(mu, sigma^2), an own sigma each, by the reparametrization w = mu + sigma n.

    Training adds kl KL(N(mu, sigma^2) || N(0, prior^2)) / images to the loss, the evidence lower
    bound for kl = 1 (Blundell et al. 2015); with `defense=madry` it is Adv-BNN (Liu et al. 2019).
    All images of a pass share the draw. Biases stay as they are.

    Parameters
    ----------
    initial
        Sigma at the start, above 0.
    prior
        Standard deviation of the prior, above 0.
    kl
        Weight of the divergence, 0 or more.
    """

    initial: float = 0.02
    prior: float = 0.1
    kl: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.above(0, initial=self.initial, prior=self.prior)
        ranges.at_least(0, kl=self.kl)

    def install(self, model: nn.Module, seed: int) -> None:
        """Make the weights of `model` random."""
        for number, layer in enumerate(layers_for("bayes", model)):
            noise = _Posterior(self, layer, derived_seed(seed, f"bayes {number}"))
            parametrize.register_parametrization(layer, "weight", noise.train(layer.training))


class _Posterior(NoiseLayer):
    def __init__(self, settings: Bayes, layer: nn.Module, seed: int) -> None:
        super().__init__(settings, seed)
        self.settings = settings
        weight = cast(Tensor, layer.weight)
        self.log_sigma = nn.Parameter(torch.full_like(weight, math.log(settings.initial)))
        # In a list, so that it is no part of what is a part of it.
        self._layer = [layer]

    @untraced
    def forward(self, weight: Tensor) -> Tensor:
        if not self.active:
            return weight
        return weight + self.log_sigma.exp() * self.drawn(weight, standard_normal, shared=True)

    def penalty(self, progress: Progress) -> Tensor:
        """KL(N(mu, sigma^2) || N(0, p^2)) = log(p / sigma) + (sigma^2 + mu^2) / (2 p^2) - 1/2."""
        mean = self._layer[0].get_parameter("parametrizations.weight.original")
        variance = (2 * self.log_sigma).exp() + mean.square()
        prior = self.settings.prior
        divergence = math.log(prior) - self.log_sigma + variance / (2 * prior**2) - 0.5
        return self.settings.kl * divergence.sum() / progress.images
