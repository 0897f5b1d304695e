"""Batches, and larger portions, of samples in memory or in files."""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from robusttrain.data.split import Samples, as_input

# Pixel values of a portion: 64 MiB as float32, and about eight times that during an attack.
PORTION = 2**24


def batch_count(size: int, batch_size: int, parts: int = 1) -> int:
    """The number of batches, of `parts` times `batch_size` images, in an epoch of `size` images."""
    full, rest = divmod(size, parts * batch_size)
    # A rest of fewer than two images per part joins the previous batch, if there is one.
    return full + (rest >= 2 * parts or (rest > 0 and full == 0))


def bounds(size: int, batch_size: int, number: int, parts: int = 1) -> tuple[int, int]:
    """Start and end of batch `number`, from 0 on, in the order of an epoch."""
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
    """Batches that contain every image of `samples` once.

    A batch is a pair of images (B, C, H, W), as float32 in [0, 1], and labels (B,). A single
    remaining image joins the previous batch, since BatchNorm cannot train on one image: the last
    batch has 2 to `batch_size` + 1 images. (With a `batch_size` of 1, all batches have one.)

    Parameters
    ----------
    samples
        The images and labels.
    batch_size
        Images in a batch of one process, 1 or more.
    generator
        A generator on the CPU that the order is drawn from. None keeps the order of the samples.
    first
        Number of the first batch to return, from 0 on.
    part, parts
        Number of this process, from 0 on, and the number of processes. The processes share batches
        of `parts` times `batch_size` images evenly.
    """
    count = batch_count(samples.size, batch_size, parts)
    if generator is None:
        order = torch.arange(samples.size)
    else:
        order = torch.randperm(samples.size, generator=generator)
    # Moved once, since with a copy for each batch the device would wait for the host each time.
    order = order.to(samples.labels.device)
    wanted = []
    for number in range(first, count):
        start, stop = bounds(samples.size, batch_size, number, parts)
        own, after = (start + (stop - start) * p // parts for p in (part, part + 1))
        wanted.append(order[own:after])
    for images, labels in samples.fetch(wanted):
        yield as_input(images), labels


def portions(samples: Samples, batch_size: int) -> Iterator[Samples]:
    """All samples in order, in portions of 64 MiB as float32, but of at least one batch."""
    size = max(batch_size, PORTION // prod(samples.image_shape))
    rows = torch.arange(samples.size)
    return map(samples.take, torch.split(rows, size) if len(rows) else ())
