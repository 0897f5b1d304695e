"""More contrast as a layer, which leaves attackers less to do with dark and bright pixels."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from robusttrain import ranges


class Contrast(nn.Module):
    """clip(contrast (x - 1/2) + 1/2, 0, 1) of images x in [0, 1].

    Pixels that are further than 1 / (2 contrast) from 1/2 become 0 or 1, as feature squeezing makes
    them (Xu, Evans and Qi 2018, who round to one bit); an attacker who cannot carry them across
    that distance changes nothing. On images that are nearly black and white only grey pixels
    are left to attack.

    Where the result is flat, a gradient would hide from attacks what lies behind. The backward pass
    is therefore that of the line without its ends (straight-through, Bengio, Léonard and Courville
    2013; as an attack, BPDA, Athalye, Carlini and Wagner 2018).

    Parameters
    ----------
    contrast
        1 or more; 1 changes nothing.
    """

    def __init__(self, contrast: float) -> None:
        super().__init__()
        ranges.at_least(1, contrast=contrast)
        self.contrast = contrast

    def forward(self, x: Tensor) -> Tensor:
        line = self.contrast * (x - 0.5) + 0.5
        # Interval bounds are of what is computed, and no tensors.
        clip = _Clip.apply if isinstance(line, Tensor) else torch.clamp
        return cast(Tensor, clip(line, 0, 1))

    def extra_repr(self) -> str:
        return f"{self.contrast:g}"


class _Clip(torch.autograd.Function):
    """`torch.clamp`, whose backward pass is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lowest: float, highest: float) -> Tensor:
        return x.clamp(lowest, highest)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None
