"""Mean-field Gaussian weights, as in Adv-BNN (Liu et al. 2019)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.noise.layer import Progress, Switches
from robusttrain.noise.weights import Weight, WeightNoise, put_on_weights, weights_for
from robusttrain.seeding import derived_seed


@dataclass
class Bayes(Switches):
    """Weights w ~ N(mu, sigma^2), each with its own sigma: w = mu + sigma n (reparametrization).

    Training adds kl KL(N(mu, sigma^2) || N(0, prior^2)) / images to the loss, the evidence lower
    bound for kl = 1 (Blundell et al. 2015); with `defense=madry` it is Adv-BNN (Liu et al. 2019).
    All images of a pass share the draw.

    Weights are the parameters of two or more axes, including those of attention. If a layer has
    weight norm or spectral norm, mu is the normalised weight. Biases and the scales of
    normalisation have no noise.

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

    def unused(self) -> dict[str, str]:
        """Also the divergence, without noise in training or without weight."""
        penalty = {} if self.kl > 0 else {"prior": "kl"}
        untrained = {} if self.train else dict.fromkeys(("kl", "prior"), "train")
        return super().unused() | penalty | untrained

    def install(self, model: nn.Module, seed: int) -> None:
        """Make the weights of `model` random.

        Raises
        ------
        InputError
            If the model has no weights, or has weights that noise cannot be added to.
        """
        layers = [
            _Posterior(self, weight, derived_seed(seed, f"bayes {number}"))
            for number, weight in enumerate(weights_for("bayes", model))
        ]
        put_on_weights(model, layers)


class _Posterior(WeightNoise):
    def __init__(self, settings: Bayes, target: Weight, seed: int) -> None:
        super().__init__(settings, target, seed)
        self.settings = settings
        mean = target.clean().detach()
        self.log_sigma = nn.Parameter(torch.full_like(mean, math.log(settings.initial)))

    def perturb(self, x: Tensor) -> Tensor:
        return x + self.log_sigma.exp() * self.standard_normal(x)

    def penalty(self, progress: Progress) -> Tensor:
        """KL(N(mu, sigma^2) || N(0, p^2)) = log(p / sigma) + (sigma^2 + mu^2) / (2 p^2) - 1/2."""
        variance = (2 * self.log_sigma).exp() + self.target.clean().square()
        prior = self.settings.prior
        divergence = math.log(prior) - self.log_sigma + variance / (2 * prior**2) - 0.5
        return self.settings.kl * divergence.sum() / progress.images
