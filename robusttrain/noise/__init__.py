"""Noise mechanisms: randomness in inputs, activations or weights of any `nn.Module`.

A mechanism is a dataclass with `install(model, seed)`, which adds layers and hooks to the model and
leaves its code alone. What it adds derives from `NoiseLayer`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from robusttrain.streams import derived_seed


class Noise(Protocol):
    """A mechanism that can be installed on a model."""

    def install(self, model: nn.Module, seed: int) -> None:
        """Add the noise to `model` in place; `seed` starts its random stream."""


class NoiseLayer(nn.Module):
    """A source of randomness with a generator of its own and a switch for each phase.

    As a layer it is the identity, so a container that calls all its children may hold it; a hook
    calls `perturb`. Crafting in eval mode leaves noise layers in the mode that they are in: an
    attack during training faces the noise of training, one during evaluation that of prediction.

    Parameters
    ----------
    train, predict
        Whether noise is drawn in train mode and in eval mode.
    seed
        Start of the layer's random stream.
    """

    def __init__(self, *, train: bool, predict: bool, seed: int) -> None:
        super().__init__()
        self.on_train = train
        self.on_predict = predict
        self.seed = seed
        self._generators: dict[str, torch.Generator] = {}

    def forward(self, x: Tensor) -> Tensor:
        return x

    @property
    def active(self) -> bool:
        """Whether `perturb` draws noise in the present mode."""
        return self.on_train if self.training else self.on_predict

    def generator(self, device: torch.device) -> torch.Generator:
        """The layer's random stream on `device`."""
        key = str(device)
        if key not in self._generators:
            self._generators[key] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[key]

    def random_states(self) -> dict[str, Tensor]:
        """The state of each stream in use, by device."""
        return {key: generator.get_state() for key, generator in self._generators.items()}


@contextmanager
def drawing_from(model: nn.Module, seed: int) -> Iterator[None]:
    """Let the noise layers of `model` draw from streams of `seed` for the length of the block.

    Afterwards they go on where they were: who looks at a model does not change its training.
    """
    layers = noise_layers(model)
    before = [(layer.seed, layer._generators) for layer in layers]
    for number, layer in enumerate(layers):
        layer.seed, layer._generators = derived_seed(seed, f"layer {number}"), {}
    try:
        yield
    finally:
        for layer, (own_seed, generators) in zip(layers, before, strict=True):
            layer.seed, layer._generators = own_seed, generators


def noise_layers(model: nn.Module) -> list[NoiseLayer]:
    """All noise layers of `model`."""
    return [module for module in model.modules() if isinstance(module, NoiseLayer)]


def predicts_randomly(model: nn.Module) -> bool:
    """Whether the predictions of `model` depend on noise that is drawn in eval mode."""
    return any(layer.on_predict for layer in noise_layers(model))
