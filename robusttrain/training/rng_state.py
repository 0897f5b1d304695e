"""Every random stream that training draws from, so that it can be resumed exactly."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from robusttrain.noise.layer import noise_layers
from robusttrain.runtime.distributed import own_seed
from robusttrain.seeding import generator_for


class RngState:
    """The streams of a training, of its model's noise, and torch's global ones.

    Parameters
    ----------
    model
        The model, on `device`.
    seed
        The seed of the run.
    device
        The device that images are augmented and attacked on.

    Attributes
    ----------
    streams
        The generators of training, by purpose.
    """

    def __init__(self, model: nn.Module, seed: int, device: torch.device) -> None:
        self.model, self.device = model, device
        own = own_seed(seed)
        self.streams = {
            # The same in all processes, which share each batch.
            "batches": generator_for(seed, "batches"),
            "augmentation": generator_for(own, "augmentation", device),
            "attack": generator_for(own, "training attack", device),
            "same draws": generator_for(own, "same draws"),
        }

    def state_dict(self) -> dict[str, Any]:
        """The states of all streams."""
        on_cuda = self.device.type == "cuda"
        return {
            "torch": torch.get_rng_state(),
            "device": torch.cuda.get_rng_state(self.device) if on_cuda else None,
            "streams": {name: own.get_state() for name, own in self.streams.items()},
            "noise": [layer.rng_state_dict() for layer in noise_layers(self.model)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        torch.set_rng_state(state["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["device"], self.device)
        for name, generator in self.streams.items():
            generator.set_state(state["streams"][name])
        for layer, of_layer in zip(noise_layers(self.model), state["noise"], strict=True):
            layer.load_rng_state_dict(of_layer)
