"""Batches cut from a split that lies whole on its device."""

from collections.abc import Iterator

import torch
from torch import Tensor

from robusttrain.data.split import Split, as_input


def batch_count(size: int, batch_size: int) -> int:
    """How many batches `batches` makes of `size` images."""
    full, rest = divmod(size, batch_size)
    # A single image left over joins the batch before it, if there is one.
    return full + (rest > 1 or (rest == 1 and full == 0))


def batches(
    split: Split, batch_size: int, generator: torch.Generator | None, *, first: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image of `split` once: images as float32 in [0, 1], (B, C, H, W), and labels, (B,).

    The order is drawn from `generator`, on the CPU; without one it is that of the split. A single
    image left over is added to the batch before it, since BatchNorm cannot train on one: the last
    batch has 2 to `batch_size` + 1 images. (Where `batch_size` is 1, all batches are single.)
    """
    count = batch_count(split.size, batch_size)
    order = None
    if generator is not None:
        # Moved once: a copy per batch would make the device wait for the host each time.
        order = torch.randperm(split.size, generator=generator).to(split.labels.device)
    for number in range(first, count):
        start = number * batch_size
        stop = split.size if number == count - 1 else start + batch_size
        chosen = slice(start, stop) if order is None else order[start:stop]
        yield as_input(split.images[chosen]), split.labels[chosen]
