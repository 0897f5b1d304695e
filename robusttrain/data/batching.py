"""Batches, and larger portions, of samples that need not lie in memory."""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from robusttrain.data.split import Samples, as_input

# Pixel values of a portion: 64 MiB as floats, and about eight times that while it is attacked.
PORTION = 2**24


def batch_count(size: int, batch_size: int) -> int:
    """How many batches `batches` makes of `size` images."""
    full, rest = divmod(size, batch_size)
    # A single image left over joins the batch before it, if there is one.
    return full + (rest > 1 or (rest == 1 and full == 0))


def batches(
    samples: Samples, batch_size: int, generator: torch.Generator | None, *, first: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image of `samples` once: images as float32 in [0, 1], (B, C, H, W), and labels, (B,).

    The order is drawn from `generator`, on the CPU; without one it is that of the samples. A single
    image left over is added to the batch before it, since BatchNorm cannot train on one: the last
    batch has 2 to `batch_size` + 1 images. (Where `batch_size` is 1, all batches are single.)
    """
    count = batch_count(samples.size, batch_size)
    if generator is None:
        order = torch.arange(samples.size)
    else:
        order = torch.randperm(samples.size, generator=generator)
    # Moved once: a copy per batch would make the device wait for the host each time.
    order = order.to(samples.labels.device)
    starts = range(first * batch_size, count * batch_size, batch_size)
    last = (count - 1) * batch_size
    parts = [order[start : None if start == last else start + batch_size] for start in starts]
    for images, labels in samples.fetch(parts):
        yield as_input(images), labels


def portions(samples: Samples, batch_size: int) -> Iterator[Samples]:
    """All samples in their order, in portions of 64 MiB as floats, and of a batch at least."""
    size = max(batch_size, PORTION // prod(samples.image_shape))
    return map(samples.take, torch.split(torch.arange(samples.size), size))
