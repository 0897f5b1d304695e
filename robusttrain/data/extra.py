"""Extra images for training, such as generated ones, which each batch has a share of.

Gowal et al. (2021), "Improving robustness using generated data", and Wang et al. (2023), "Better
diffusion models further improve adversarial training", mix them so. They are never validated or
tested on.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from robusttrain.data import array_files, labels
from robusttrain.data.array_files import ALONE, TRAIN, Source
from robusttrain.data.batching import batch_count, batches, bounds
from robusttrain.data.labels import Origin
from robusttrain.data.mapped import Mapped
from robusttrain.data.split import Info, Samples, as_input
from robusttrain.errors import InputError
from robusttrain.seeding import generator_for


@runtime_checkable
class Extended(Protocol):
    """A data set with settings for extra images."""

    extra: str | None
    extra_labels: str | None
    extra_share: float


def extra_samples(dataset: object, info: Info) -> Mapped | None:
    """The extra images of a data set, which has the images and classes of `info`; None without.

    Raises
    ------
    InputError
        If they cannot be read, or have another shape or other classes.
    """
    if not isinstance(dataset, Extended) or dataset.extra is None:
        return None
    source = Source("dataset.extra", dataset.extra, dataset.extra_labels, (*TRAIN, *ALONE))
    channels, height, width = info.image_shape
    pair = array_files.read(source, _layouts(channels, height, width))
    names = info.class_names or tuple(map(str, range(info.num_classes)))
    numbers = labels.numbered(pair.labels, names, Origin(source.key, source.path))
    return Mapped(pair.images, np.arange(len(numbers)), torch.from_numpy(numbers))


def _layouts(channels: int, height: int, width: int) -> dict[tuple[int, ...], str]:
    """The layout of images of each shape that fits."""
    found: dict[tuple[int, ...], str] = {
        (height, width, channels): "NHWC",
        (channels, height, width): "NCHW",
    }
    if channels == 1:
        found[height, width] = "NHW"
    return found


def own_images(share: float, batch_size: int) -> int:
    """The images in a batch of one process that are not extra ones, with this share of those.

    Raises
    ------
    InputError
        If a batch would have no extra image, or no other one.
    """
    extra = math.floor(share * batch_size + 0.5)
    if not 0 < extra < batch_size:
        problem = f"gives {extra} of the {batch_size} images of a batch"
        allowed = "a batch needs extra images and others: change the share, or batch_size"
        raise InputError("dataset.extra_share", share, allowed, problem)
    return batch_size - extra


@dataclass(frozen=True)
class Extra:
    """Extra images, and their share of a batch.

    A batch of one process with `batch_size` images has `share` times as many extra ones, rounded to
    whole images, a half upward; the others are `own`. The last batch of an epoch, which has another
    number of own images, has extra ones in proportion. Extra images come in a random order, all of
    them before any comes again, through the epochs.

    Parameters
    ----------
    samples
        The extra images.
    share
        Their share of a batch, between 0 and 1.
    seed
        The seed of the run.
    """

    samples: Samples
    share: float
    seed: int

    def own(self, batch_size: int) -> int:
        """The images in a batch of one process that are not extra ones."""
        return own_images(self.share, batch_size)

    def beside(self, own: int, batch_size: int) -> int:
        """The extra images in a batch, of one process or of all, that has `own` other ones."""
        full = self.own(batch_size)
        return (2 * own * (batch_size - full) + full) // (2 * full)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the extra images at positions in the order of all epochs, (stop - start,)."""
        parts = []
        while start < stop:
            turn, first = divmod(start, self.samples.size)
            last = min(self.samples.size, first + stop - start)
            parts.append(_order(self.seed, turn, self.samples.size)[first:last])
            start += last - first
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


@lru_cache(maxsize=2)
def _order(seed: int, turn: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator_for(seed, f"extra images {turn}"))


@dataclass(frozen=True)
class Batches:
    """The batches of a training: all training images once in an epoch, and extra ones beside them.

    Parameters
    ----------
    train
        The training images.
    extra
        The extra images, or None.
    batch_size
        Images in a batch of one process, extra ones included.
    part, parts
        Number of this process, from 0 on, and the number of processes.
    """

    train: Samples
    extra: Extra | None
    batch_size: int
    part: int = 0
    parts: int = 1

    @property
    def own(self) -> int:
        """The training images in a batch of one process."""
        return self.batch_size if self.extra is None else self.extra.own(self.batch_size)

    @property
    def count(self) -> int:
        """The number of batches in an epoch."""
        return batch_count(self.train.size, self.own, self.parts)

    def images(self, number: int) -> int:
        """The images of all processes in batch `number` of an epoch, from 0 on."""
        start, stop = bounds(self.train.size, self.own, number, self.parts)
        return stop - start + self._extra_images(number)

    @property
    def images_per_epoch(self) -> int:
        """The images of all processes in an epoch."""
        return self.train.size + self._extra_before(self.count)

    def epoch(
        self, generator: torch.Generator, number: int = 1, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch `number`, from 1 on, beginning with batch `first`, from 0 on.

        A batch is a pair of images (B, C, H, W), as float32 in [0, 1], and labels (B,). The order
        of the training images is drawn from `generator`, and that of extra ones depends on the seed
        and the numbers of epoch and batch alone.
        """
        own = batches(
            self.train, self.own, generator, first=first, part=self.part, parts=self.parts
        )
        if self.extra is None:
            return own
        wanted = [self._rows(number, batch) for batch in range(first, self.count)]
        fetched = self.extra.samples.fetch(wanted)
        return (
            self._mixed(f"extra places {number} {first + place}", *pairs)
            for place, pairs in enumerate(zip(own, fetched, strict=True))
        )

    def _mixed(
        self, name: str, own: tuple[Tensor, Tensor], extra: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Both at random places, since a batch may be cut in parts."""
        assert self.extra is not None
        x, y = torch.cat([own[0], as_input(extra[0])]), torch.cat([own[1], extra[1]])
        order = torch.randperm(len(y), generator=generator_for(self.extra.seed, name)).to(y.device)
        return x[order], y[order]

    def _rows(self, epoch: int, number: int) -> Tensor:
        """Rows of this process's extra images in a batch."""
        assert self.extra is not None
        before = (epoch - 1) * self._extra_before(self.count) + self._extra_before(number)
        images = self._extra_images(number)
        start, stop = (before + images * p // self.parts for p in (self.part, self.part + 1))
        return self.extra.rows(start, stop).to(self.extra.samples.labels.device)

    def _extra_before(self, number: int) -> int:
        """The extra images of all processes in an epoch before batch `number`."""
        full = min(number, self.count - 1) * self._extra_images(0) if self.count > 1 else 0
        return full + (self._extra_images(number - 1) if number == self.count else 0)

    def _extra_images(self, number: int) -> int:
        if self.extra is None:
            return 0
        start, stop = bounds(self.train.size, self.own, number, self.parts)
        return self.extra.beside(stop - start, self.batch_size)
