"""No noise: the model computes what its layers say."""

from dataclasses import dataclass

from torch import nn


@dataclass
class NoNoise:
    """Leaves the model alone."""

    def install(self, model: nn.Module, seed: int) -> None:
        """Do nothing."""
