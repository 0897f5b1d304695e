"""Resizing as a layer, for networks that compute at another size than that of the images."""

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Resize(nn.Module):
    """Images (N, C, H, W) at `size` x `size` pixels: bilinear, and smoothed if they shrink.

    Gradients pass through it, so that attacks search among the images before it.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
