"""Parametric noise injection (He, Rakin and Fan 2019)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robusttrain import ranges
from robusttrain.noise.layer import NoiseLayer, Switches, attach, standard_normal, untraced
from robusttrain.noise.placement import layers_for
from robusttrain.seeding import derived_seed


@dataclass
class _Scaled(Switches):
    initial: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.at_least(0, initial=self.initial)


@dataclass
class PNIWeights(_Scaled):
    """w + scale n for every convolution and linear layer, n ~ N(0, std(w)^2), a draw each pass.

    PNI-W of He, Rakin and Fan 2019. `scale` is one learnable number a layer,
    without weight decay; n is constant in the gradient. All images of a pass share the draw. The
    paper trains with `defense=alpha_mix attack=pgd`. What it gains is seen by attacks that do not
    average over draws: compare the rows `noise_off`, `noise_fixed` and those of the draws.

    Parameters
    ----------
    initial
        The scale at the start, 0 or more.
    """

    def install(self, model: nn.Module, seed: int) -> None:
        """Add the noise to the weights of `model`."""
        for number, layer in enumerate(layers_for("pni_w", model)):
            noise = _WeightNoise(self, derived_seed(seed, f"pni_w {number}"))
            parametrize.register_parametrization(layer, "weight", noise.train(layer.training))


@dataclass
class PNIActivations(_Scaled):
    """z + scale n at the input of every convolution and linear layer, n ~ N(0, std(z)^2).

    PNI-A of He, Rakin and Fan 2019; see `PNIWeights`. The standard deviation is that of each
    image's own activations, so that its prediction does not hang on the rest of the batch.

    Parameters
    ----------
    initial
        The scale at the start, 0 or more.
    """

    def install(self, model: nn.Module, seed: int) -> None:
        """Add the noise to the activations of `model`."""
        for number, place in enumerate(layers_for("pni_a", model)):
            noise = _ActivationNoise(self, derived_seed(seed, f"pni_a {number}"))
            attach(model, noise)
            place.register_forward_pre_hook(noise.before)


class _ScaledNoise(NoiseLayer):
    def __init__(self, noise: _Scaled, seed: int) -> None:
        super().__init__(noise, seed)
        self.scale = nn.Parameter(torch.tensor(float(noise.initial)))


class _WeightNoise(_ScaledNoise):
    @untraced
    def forward(self, weight: Tensor) -> Tensor:
        if not self.active:
            return weight
        noise = self.drawn(weight, standard_normal, shared=True)
        return weight + self.scale * weight.detach().std() * noise


class _ActivationNoise(_ScaledNoise):
    def perturb(self, x: Tensor) -> Tensor:
        spread = x.detach().flatten(1).std(1).view(-1, *[1] * (x.dim() - 1))
        return x + self.scale * spread * self.drawn(x, standard_normal)
