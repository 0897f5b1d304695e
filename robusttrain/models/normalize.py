"""Normalisation as a layer, so that attacks and radii are in pixel units."""

import math

import torch
from torch import Tensor, nn

from robusttrain import ranges


def check_statistics(mean: list[float], std: list[float]) -> None:
    """Raise `InputError` unless all means are finite and all standard deviations are above 0."""
    ranges.require(_are_numbers(mean), "mean", mean, "a list of finite numbers")
    ok = _are_numbers(std) and all(value > 0 for value in std)
    ranges.require(ok, "std", std, "a list of finite numbers above 0")


def _are_numbers(values: object) -> bool:
    # The section of a network of the user's own has no types.
    return isinstance(values, list | tuple) and all(
        isinstance(value, int | float) and math.isfinite(value) for value in values
    )


class Normalize(nn.Module):
    """(x - mean) / std, per channel, of images (N, channels, H, W) in [0, 1].

    `mean` and `std` have one entry for all channels or one per channel; `InputError` otherwise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: list[float], std: list[float], channels: int) -> None:
        super().__init__()
        check_statistics(mean, std)
        for key, values in (("mean", mean), ("std", std)):
            allowed = f"a list of 1 number, or of one for each channel of the images ({channels})"
            ranges.require(len(values) in (1, channels), key, values, allowed)
            self.register_buffer(key, torch.tensor(values)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std
