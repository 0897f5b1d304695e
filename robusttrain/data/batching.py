"""Batches, and larger portions, of samples that need not lie in memory."""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from robusttrain.data.split import Samples, as_input

# Pixel values of a portion: 64 MiB as floats, and about eight times that while it is attacked.
PORTION = 2**24


def batch_count(size: int, batch_size: int, parts: int = 1) -> int:
    """How many batches of `parts` times `batch_size` images `batches` makes of `size` images."""
    full, rest = divmod(size, parts * batch_size)
    # Fewer than two images for a part join the batch before them, if there is one.
    return full + (rest >= 2 * parts or (rest > 0 and full == 0))


def bounds(size: int, batch_size: int, number: int, parts: int = 1) -> tuple[int, int]:
    """Where batch `number`, from 0 on, starts and ends in the order of an epoch."""
    start = number * parts * batch_size
    last = number == batch_count(size, batch_size, parts) - 1
    return start, size if last else start + parts * batch_size


def batches(
    samples: Samples,
    batch_size: int,
    generator: torch.Generator | None,
    *,
    first: int = 0,
    part: int = 0,
    parts: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image of `samples` once: images as float32 in [0, 1], (B, C, H, W), and labels, (B,).

    The order is drawn from `generator`, on the CPU; without one it is that of the samples. A single
    image left over is added to the batch before it, since BatchNorm cannot train on one: the last
    batch has 2 to `batch_size` + 1 images. (Where `batch_size` is 1, all batches are single.)

    Where processes share the work, each gets its `part` of batches of `parts` times `batch_size`
    images, of which the last is divided as evenly as the others.
    """
    count = batch_count(samples.size, batch_size, parts)
    if generator is None:
        order = torch.arange(samples.size)
    else:
        order = torch.randperm(samples.size, generator=generator)
    # Moved once: a copy per batch would make the device wait for the host each time.
    order = order.to(samples.labels.device)
    wanted = []
    for number in range(first, count):
        start, stop = bounds(samples.size, batch_size, number, parts)
        own, after = (start + (stop - start) * p // parts for p in (part, part + 1))
        wanted.append(order[own:after])
    for images, labels in samples.fetch(wanted):
        yield as_input(images), labels


def portions(samples: Samples, batch_size: int) -> Iterator[Samples]:
    """All samples in their order, in portions of 64 MiB as floats, and of a batch at least."""
    size = max(batch_size, PORTION // prod(samples.image_shape))
    rows = torch.arange(samples.size)
    return map(samples.take, torch.split(rows, size) if len(rows) else ())
