"""Randomness that no layer of noise declares: outputs for the same images that differ."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robusttrain import seeding
from robusttrain.noise.control import drawing_from

# Differences up to this share of the spread of the outputs, or up to so many units in the last
# place of the largest one, may come from sums in another order. With every sum of a ResNet-50 in
# another order the first is 5e-6 in float32, and the second 7 in bfloat16.
SHARE, UNITS = 1e-3, 16

# Perturbations of images, in pixel units: the least one leaves the grid of bytes.
LEAST, LARGEST = 1 / 510, 1 / 2

# Looks at a model that draws random numbers, until one shows that its outputs depend on them.
LOOKS = 32


class Repeated(NamedTuple):
    """Outputs (N, K) for images, and how far those of other passes are apart; see `apart`."""

    outputs: Tensor
    apart: float


@torch.no_grad()
def repeated(model: nn.Module, x: Tensor) -> Repeated:
    """Outputs for images `x` (N, C, H, W), compared with what other passes over them return.

    Attacks show the model perturbed images, so outputs for these are compared as well. Each image
    is perturbed by another size, from half a step of the byte grid to half the range of pixels.
    Declared noise is the same in every pass. A pass is compared with one other, or with up to
    `LOOKS` others if it moves torch's global random stream, so that rare draws are seen too.
    """
    clean = _looked_at(model, x)
    if clean.apart:
        return clean
    return clean._replace(apart=_looked_at(model, _perturbed(x)).apart)


def apart(model: nn.Module, one: Tensor, other: Tensor, share: float = SHARE) -> float:
    """The largest difference between outputs (N, K) of `model` for the same images.

    It is a share of the spread, largest minus smallest output, of the image or of the median image,
    whichever is larger. Differences that may be rounding count as 0: those up to `share`, and up to
    `UNITS` in the last place by the coarsest number format among outputs and parameters. No offset
    and no scale of the outputs changes it, but for what the number format can no longer tell apart.
    """
    formats = [t.dtype for t in (one, *model.parameters()) if t.is_floating_point()]
    unit = UNITS * max(torch.finfo(kind).eps for kind in formats)
    one, other = one.double(), other.double()
    same = (one == other) | (one.isnan() & other.isnan())
    # What is finite in only one of both differs by infinity.
    difference = (one - other).abs().masked_fill(same, 0).nan_to_num(math.inf, math.inf).amax(1)
    spread, size = one.amax(1) - one.amin(1), one.nan_to_num(0, 0, 0).abs().amax(1)
    finite = spread.isfinite()
    median = spread[finite].median() if finite.any() else 0
    spread = spread.where(finite, median).clamp_min(median)
    rounding = (max(share, unit) * spread).maximum(unit * size)
    shares = (difference / spread).where(difference > rounding, 0)
    return float(shares.max())


def _looked_at(model: nn.Module, x: Tensor) -> Repeated:
    before = _streams(x.device)
    outputs = _outputs(model, x)
    draws = not all(map(torch.equal, before, _streams(x.device)))
    for _ in range(LOOKS if draws else 1):
        difference = apart(model, outputs, _outputs(model, x))
        if difference:
            break
    return Repeated(outputs, difference)


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    with drawing_from(model, 0):
        logits: Tensor = model(x)
    return logits


def _perturbed(x: Tensor) -> Tensor:
    """Images next to `x`, within [0, 1]: each by another size, and none of them of bytes."""
    generator = seeding.generator_for(0, "perturbed images", x.device)
    ends = math.log10(LEAST), math.log10(LARGEST)
    sizes = torch.logspace(*ends, len(x), dtype=x.dtype, device=x.device)
    noise = torch.empty_like(x).uniform_(-1, 1, generator=generator)
    moved = x + sizes.view(-1, *[1] * (x.dim() - 1)) * noise
    # Black and white pixels would stay if the box cut them off; they are mirrored.
    return 1 - (1 - moved.abs()).abs()


def _streams(device: torch.device) -> list[Tensor]:
    """The states of torch's global random streams."""
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]
