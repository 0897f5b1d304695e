"""Parametric noise injection (He, Rakin and Fan 2019)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.noise.layer import NoiseLayer, Switches, attach, standard_normal
from robusttrain.noise.placement import layers_for
from robusttrain.noise.weights import Weight, WeightNoise, put_on_weights, weights_for
from robusttrain.seeding import derived_seed


@dataclass
class _Scaled(Switches):
    initial: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.at_least(0, initial=self.initial)


@dataclass
class PNIWeights(_Scaled):
    """w + scale n for every tensor of weights, n ~ N(0, std(w)^2), with a new draw in each pass.

    PNI-W of He, Rakin and Fan 2019. `scale` is one learnable number per tensor, without weight
    decay; n is a constant of the gradient. All images of a pass share the draw. The paper trains
    with `defense=alpha_mix attack=pgd`. Its gain only shows under attacks that do not average over
    draws: compare the rows `noise_off` and `noise_fixed` with those of several draws (`eot_`).

    Weights are the parameters of two or more axes, including those of attention. If a layer has
    weight norm or spectral norm, the noise is added to the normalised weight. Biases and the scales
    of normalisation have no noise, nor has a tensor whose entries are all equal.

    Parameters
    ----------
    initial
        The scale at the start, 0 or more.
    """

    def install(self, model: nn.Module, seed: int) -> None:
        """Add the noise to the weights of `model`.

        Raises
        ------
        InputError
            If the model has no weights, or has weights that noise cannot be added to.
        """
        layers = [
            _WeightNoise(self, weight, derived_seed(seed, f"pni_w {number}"))
            for number, weight in enumerate(weights_for("pni_w", model))
        ]
        put_on_weights(model, layers)


@dataclass
class PNIActivations(_Scaled):
    """z + scale n at the input of every convolution and linear layer, n ~ N(0, std(z)^2).

    PNI-A of He, Rakin and Fan 2019; see `PNIWeights`. The standard deviation is that of each
    image's own activations, so that its prediction does not depend on the rest of the batch.

    Parameters
    ----------
    initial
        The scale at the start, 0 or more.
    """

    def install(self, model: nn.Module, seed: int) -> None:
        """Add the noise to the activations of `model`."""
        for number, place in enumerate(layers_for("pni_a", model)):
            noise = _ActivationNoise(self, derived_seed(seed, f"pni_a {number}"))
            attach(model, noise, place)
            place.register_forward_pre_hook(noise.before)


class _WeightNoise(WeightNoise):
    def __init__(self, noise: _Scaled, target: Weight, seed: int) -> None:
        super().__init__(noise, target, seed)
        self.scale = _scale(noise)

    def perturb(self, x: Tensor) -> Tensor:
        deviation = x.detach().std(correction=_correction(x.numel()))
        return x + self.scale * deviation * self.standard_normal(x)


class _ActivationNoise(NoiseLayer):
    def __init__(self, noise: _Scaled, seed: int) -> None:
        super().__init__(noise, seed)
        self.scale = _scale(noise)

    def perturb(self, x: Tensor) -> Tensor:
        rows = x.detach().flatten(1)
        deviations = rows.std(1, correction=_correction(rows.shape[1]))
        scales = self.scale * deviations.view(-1, *[1] * (x.dim() - 1))
        return x + scales * self.drawn(x, standard_normal)


def _scale(noise: _Scaled) -> nn.Parameter:
    return nn.Parameter(torch.tensor(float(noise.initial)))


def _correction(count: int) -> int:
    """Bessel's correction for `count` values; 0 for a single value, so that its deviation is 0."""
    return min(1, count - 1)
