"""The weights alone, as safetensors."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from robusttrain.export import Runner


class SafeTensors:
    """The tensors of the state dict, for programs that have the architecture."""

    suffix = ".safetensors"
    holds_code = False
    packages: tuple[str, ...] = ("safetensors",)

    def write(
        self, network: nn.Module, example: Tensor, path: Path, about: Mapping[str, str]
    ) -> None:
        """Write the tensors; one that has several names is written once."""
        from safetensors.torch import save_model

        save_model(network, str(path), dict(about))

    def opened(self, path: Path, network: nn.Module) -> Runner:
        """A copy of the network with the weights of the file, and none of its own."""
        from safetensors.torch import load_model

        loaded = copy.deepcopy(network)
        with torch.no_grad():
            for tensor in loaded.state_dict().values():
                tensor.fill_(math.nan if tensor.is_floating_point() else 0)
        load_model(loaded, path)
        return loaded
