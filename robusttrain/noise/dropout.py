"""Dropout that is also active in prediction (Gal and Ghahramani 2016)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.errors import InputError
from robusttrain.noise.layer import NoiseLayer, Switches, attach
from robusttrain.noise.placement import layers_for
from robusttrain.seeding import derived_seed


@dataclass
class Dropout(Switches):
    """Zeroes activations before every layer with weights but the first (Gal and Ghahramani 2016).

    The others are divided by 1 - p. Draws are independent for every entry.

    Parameters
    ----------
    p
        Probability that an activation is zeroed, from 0 to below 1.
    """

    p: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.require(0 <= self.p < 1, "p", self.p, "from 0 to below 1")

    def refuse_without_effect(self) -> None:
        """Raise `InputError` if nothing is ever zeroed."""
        super().refuse_without_effect()
        ranges.require(self.p > 0, "p", self.p, "above 0: without dropout, noise=none")

    def install(self, model: nn.Module, seed: int) -> None:
        """Add the noise to `model`."""
        _, *places = layers_for("dropout", model)
        if not places:
            raise InputError(
                "noise", "dropout", "the model has one", "needs a second layer with weights"
            )
        for number, place in enumerate(places):
            layer = _Mask(self, derived_seed(seed, f"dropout {number}"))
            attach(model, layer, place)
            place.register_forward_pre_hook(layer.before)


class _Mask(NoiseLayer):
    def __init__(self, settings: Dropout, seed: int) -> None:
        super().__init__(settings, seed)
        self.kept = 1 - settings.p

    def perturb(self, x: Tensor) -> Tensor:
        return x * self.drawn(x, self._mask) / self.kept

    def _mask(self, memory: Tensor, generator: torch.Generator) -> Tensor:
        # On a CPU bernoulli_ takes four times as long.
        return memory.copy_(memory.uniform_(generator=generator) < self.kept)
