"""Gaussian noise on the input (Cohen, Rosenfeld and Kolter 2019, section 3.3)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.noise import NoiseLayer


@dataclass
class Gaussian:
    """x + sigma * N(0, I), never clipped to the box.

    Parameters
    ----------
    sigma
        Standard deviation in pixel units, 0 or more.
    train, predict
        Whether training and prediction see the noise. With `predict`, evaluation attacks the
        expectation over draws and scores on fresh ones.
    """

    sigma: float = 0.25
    train: bool = True
    predict: bool = False

    def __post_init__(self) -> None:
        ranges.at_least(0, sigma=self.sigma)

    def install(self, model: nn.Module, seed: int) -> None:
        """Draw noise in front of `model`."""
        layer = _GaussianInput(self.sigma, train=self.train, predict=self.predict, seed=seed)
        model.add_module("input_noise", layer)
        model.register_forward_pre_hook(layer.perturb_arguments)


class _GaussianInput(NoiseLayer):
    def __init__(self, sigma: float, *, train: bool, predict: bool, seed: int) -> None:
        super().__init__(train=train, predict=predict, seed=seed)
        self.sigma = sigma

    def perturb_arguments(
        self, module: nn.Module, arguments: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        if not self.active:
            return arguments
        x, *others = arguments
        noise = torch.empty_like(x).normal_(0, self.sigma, generator=self.generator(x.device))
        return (x + noise, *others)
