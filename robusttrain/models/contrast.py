"""A layer that increases the contrast, so that dark and bright pixels resist small changes."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from robusttrain import ranges


class Contrast(nn.Module):
    """clip(contrast (x - 1/2) + 1/2, 0, 1) of images x in [0, 1].

    Pixels that are further than 1 / (2 contrast) from 1/2 become 0 or 1, similar to feature
    squeezing (Xu, Evans and Qi 2018, who round to one bit). A perturbation that does not move a
    pixel within that distance changes nothing. On images that are nearly black and white, attacks
    can then use grey pixels only.

    The clip has gradient 0 at its flat ends, which would mask the gradient from attacks. The
    backward pass is therefore that of the line without the clip (straight-through, Bengio, Léonard
    and Courville 2013; as an attack, BPDA, Athalye, Carlini and Wagner 2018).

    Parameters
    ----------
    contrast
        Slope of the line, 1 or more; 1 changes nothing.
    """

    def __init__(self, contrast: float) -> None:
        super().__init__()
        ranges.at_least(1, contrast=contrast)
        self.contrast = contrast

    def forward(self, x: Tensor) -> Tensor:
        line = self.contrast * (x - 0.5) + 0.5
        # TorchScript compiles no autograd functions. The sum rounds once more.
        if is_scripting():
            return line + (line.clamp(0, 1) - line).detach()
        # Without a gradient, as for interval bounds, the two are the same.
        clip = _Clip.apply if line.requires_grad else torch.clamp
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
