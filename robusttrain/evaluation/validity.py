"""What attacks return, held against their threat model: only points of S(x) can be successes."""

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from robusttrain.threat import Threat
from robusttrain.threat.balls import TOLERANCE, ball, in_float64, per_image

# How far a pixel may be out of the box [0, 1]: a step of float32 at 1. In small balls it is less,
# as much as an image may lie outside of the ball.
BOX_TOLERANCE = 2.0**-23


class Checked(NamedTuple):
    """Images (N, C, H, W) that are valid: what an attack returned, or the image where it is not.

    `invalid` says how many are not.
    """

    x_adv: Tensor
    invalid: int


def checked(returned: object, x: Tensor, threat: Threat, batch_size: int) -> Checked:
    """What an attack `returned` for images `x`, with `x` in the place of invalid images.

    See `invalid_images` for the rest.
    """
    invalid = invalid_images(returned, x, threat, batch_size)
    x_adv = x
    if _is_like(returned, x):
        x_adv = torch.where(per_image(invalid, x), x, returned.detach())
    return Checked(x_adv, int(invalid.sum()))


def invalid_images(returned: object, x: Tensor, threat: Threat, batch_size: int) -> Tensor:
    """Which images that an attack `returned` for `x` are no points of S(x), (N,) on its device.

    These are images with a pixel that is not finite, and images outside of the ball of `threat` by
    more than `TOLERANCE` of its radius, or of the box by more than that or `BOX_TOLERANCE`. Where
    the shape, the dtype or the device is not that of `x`, they are all of them.

    Parameters
    ----------
    returned
        Whatever the attack returned.
    x
        Images (N, C, H, W) in [0, 1].
    threat
        The threat model that it was to keep to.
    batch_size
        Images that are looked at together, in float64.
    """
    if not _is_like(returned, x):
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    ends, starts = torch.split(returned.detach(), batch_size), torch.split(x, batch_size)
    outside = [_outside(*pair, threat) for pair in zip(ends, starts, strict=True)]
    return torch.cat(outside).to(x.device)


def _is_like(returned: object, x: Tensor) -> TypeGuard[Tensor]:
    return isinstance(returned, Tensor) and all(
        getattr(returned, key) == getattr(x, key) for key in ("shape", "dtype", "device", "layout")
    )


def _outside(x_adv: Tensor, x: Tensor, threat: Threat) -> Tensor:
    end, start = in_float64(x_adv), in_float64(x)
    most = TOLERANCE * threat.eps
    out_of_box = torch.maximum(-end, end - 1).flatten(1).amax(1)
    out_of_ball = ball(threat).norm(end - start) - threat.eps
    # Of NaN neither is true.
    return ~((out_of_box <= min(most, BOX_TOLERANCE)) & (out_of_ball <= most))
