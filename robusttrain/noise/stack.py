"""Several mechanisms on one model."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from robusttrain.noise import Noise
from robusttrain.seeding import derived_seed


@dataclass
class Stack:
    """Installs several mechanisms in order, each with its own random stream.

    `noise=[gaussian,pni_w]` on the command line is short for it.

    Parameters
    ----------
    mechanisms
        The mechanisms, by any names.
    """

    mechanisms: Mapping[str, Noise]

    def install(self, model: nn.Module, seed: int) -> None:
        """Install all of them on `model`."""
        for name, mechanism in self.mechanisms.items():
            mechanism.install(model, derived_seed(seed, name))
