"""Batches cut from a split that lies whole on its device."""

from collections.abc import Iterator

import torch
from torch import Tensor

from robusttrain.data.split import Split, as_input


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
    split: Split,
    batch_size: int,
    generator: torch.Generator | None,
    *,
    first: int = 0,
    part: int = 0,
    parts: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image of `split` once: images as float32 in [0, 1], (B, C, H, W), and labels, (B,).

    The order is drawn from `generator`, on the CPU; without one it is that of the split. A single
    image left over is added to the batch before it, since BatchNorm cannot train on one: the last
    batch has 2 to `batch_size` + 1 images. (Where `batch_size` is 1, all batches are single.)

    Where processes share the work, each gets its `part` of batches of `parts` times `batch_size`
    images, of which the last is divided as evenly as the others.
    """
    count = batch_count(split.size, batch_size, parts)
    order = None
    if generator is not None:
        # Moved once: a copy per batch would make the device wait for the host each time.
        order = torch.randperm(split.size, generator=generator).to(split.labels.device)
    for number in range(first, count):
        start, stop = bounds(split.size, batch_size, number, parts)
        images = stop - start
        start, stop = (start + images * p // parts for p in (part, part + 1))
        chosen = slice(start, stop) if order is None else order[start:stop]
        yield as_input(split.images[chosen]), split.labels[chosen]
