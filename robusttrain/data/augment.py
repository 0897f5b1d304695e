"""Random shifts and reflections of a batch, on its device."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def augment(images: Tensor, crop: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each image at random by up to `crop` pixels; with `flip`, mirror half of the images.

    Each image is padded with `crop` zeros on each side, and a window of the original size is cut
    out at a random offset. All offsets are equally likely. The mirror swaps left and right.

    Parameters
    ----------
    images
        Images (N, C, H, W) of any dtype.
    crop
        Largest shift in each direction, in pixels, 0 or more.
    flip
        Whether to mirror each image with probability 1/2.
    generator
        A generator on the device of the images. It is not used if `crop` is 0 and `flip` is false.
    """
    if crop > 0:
        images = _shift(images, crop, generator)
    if flip:
        mirrored = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < 0.5
        images = torch.where(mirrored, images.flip(3), images)
    return images


def _shift(images: Tensor, crop: int, generator: torch.Generator) -> Tensor:
    count, _, height, width = images.shape
    # A view of all windows of all images: (N, C, offsets down, offsets right, H, W).
    windows = pad(images, [crop] * 4).unfold(2, height, 1).unfold(3, width, 1)
    offsets = torch.randint(2 * crop + 1, (2, count), generator=generator, device=images.device)
    each = torch.arange(count, device=images.device)
    return windows[each, :, offsets[0], offsets[1]]
