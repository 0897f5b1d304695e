"""Independent noise that is added to an input or an activation (Pinot et al. 2019)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.noise.layer import NoiseLayer, Switches
from robusttrain.noise.placement import INPUT, put
from robusttrain.threat import Norm


class Certificate(NamedTuple):
    """The certificate of smoothing with a noise: the norm of its radii, and its paper."""

    norm: Norm
    paper: str


@dataclass
class AdditiveNoise(Switches, ABC):
    """Base of additive noise with independent entries, which is never clipped to the box.

    Parameters
    ----------
    sigma
        Standard deviation of an entry, in pixel units at the input, 0 or more.
    at
        Where the noise is added: `input`, `first` (the output of the first layer with weights), or
        the name of a layer, for its output.
    draws
        If given, a training step uses this number of draws for each image, and the attack and the
        outer loss use the same ones (SmoothAdv, Salman et al. 2019). The attack climbs the loss of
        the mean softmax over the draws. Otherwise each pass has a new draw.
    """

    sigma: float = 0.25
    predict: bool = field(default=False, kw_only=True)
    at: str = field(default=INPUT, kw_only=True)
    draws: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.at_least(0, sigma=self.sigma)
        if self.draws is not None:
            ranges.at_least(1, draws=self.draws)

    def refuse_without_effect(self) -> None:
        """Raise `InputError` if the noise is 0, or never drawn."""
        super().refuse_without_effect()
        ranges.require(self.sigma > 0, "sigma", self.sigma, "above 0: without noise, noise=none")

    def unused(self) -> dict[str, str]:
        """Also `draws`, without noise in training."""
        return super().unused() | ({} if self.train else {"draws": "train"})

    def install(self, model: nn.Module, seed: int) -> None:
        """Add the noise to `model`.

        Raises
        ------
        InputError
            If the model has no layer `at`.
        """
        put(AdditiveLayer(self, self, seed), model, self.at)

    @abstractmethod
    def sample(self, memory: Tensor, generator: torch.Generator) -> Tensor:
        """Fill `memory` with noise."""

    @property
    def certificate(self) -> Certificate | None:
        """The certificate of smoothing with this noise at the input, if one is known."""
        return None

    def radius(self, probability: float) -> float:
        """The radius in which a class of at least this `probability`, above 1/2, stays on top."""
        raise NotImplementedError


class AdditiveLayer(NoiseLayer):
    """A layer that adds `noise` to its input."""

    def __init__(self, noise: AdditiveNoise, switches: Switches, seed: int) -> None:
        super().__init__(switches, seed)
        self.noise, self.draws = noise, noise.draws

    def perturb(self, x: Tensor) -> Tensor:
        """x + noise."""
        return x + self.drawn(x, self.noise.sample)
