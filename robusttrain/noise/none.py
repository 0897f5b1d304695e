"""No noise."""

from dataclasses import dataclass

from torch import nn


@dataclass
class NoNoise:
    """No noise: the model is not changed."""

    def install(self, model: nn.Module, seed: int) -> None:
        """Do nothing."""
