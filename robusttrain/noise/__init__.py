"""Noise mechanisms: randomness in inputs, activations or weights of any `nn.Module`.

A mechanism is a dataclass with `install(model, seed)`, which adds layers, hooks and
parametrizations to the model, but does not change its code. Each of them is a `NoiseLayer`.
"""

from typing import Protocol

from torch import nn


class Noise(Protocol):
    """A mechanism that can be installed on a model."""

    def install(self, model: nn.Module, seed: int) -> None:
        """Add the noise to `model` in place; `seed` is the seed of its random streams."""
