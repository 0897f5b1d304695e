"""Random shifts and reflections of a batch, on its device."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def augment(images: Tensor, crop: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `crop` pixels either way and, with `flip`, mirror one in two.

    `images` has shape (N, C, H, W) and any dtype. Each image is surrounded by `crop` zeros and a
    window of its size is cut out at an offset of its own, all offsets being equally likely; the
    mirror swaps left and right. `generator` lives on the images' device and is left alone where
    nothing is asked for.
    """
    if crop > 0:
        images = _shift(images, crop, generator)
    if flip:
        mirrored = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < 0.5
        images = torch.where(mirrored, images.flip(3), images)
    return images


def _shift(images: Tensor, crop: int, generator: torch.Generator) -> Tensor:
    count, _, height, width = images.shape
    # A view with every window of every image: (N, C, offsets down, offsets right, H, W).
    windows = pad(images, [crop] * 4).unfold(2, height, 1).unfold(3, width, 1)
    offsets = torch.randint(2 * crop + 1, (2, count), generator=generator, device=images.device)
    each = torch.arange(count, device=images.device)
    return windows[each, :, offsets[0], offsets[1]]
