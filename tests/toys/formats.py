"""Networks that compute in other number formats than float32."""

import copy

import torch
from torch import Tensor, nn

FORMATS = [torch.float64, torch.bfloat16, torch.float16]


class InFormat(nn.Module):
    """A network that takes float32 images, and computes and returns logits in its own format."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = copy.deepcopy(network).to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x.to(self.dtype))
        return logits
