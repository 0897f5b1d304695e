"""What a data set is once it is read: uint8 images and int64 labels, whole, on one device."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from robusttrain import ranges
from robusttrain.runtime.progress import Advance, unreported
from robusttrain.seeding import generator_for


class Info(NamedTuple):
    """What is known of a data set before its images are read, so that a model can be checked.

    `image_shape` is (channels, height, width); `class_names` has one name per label.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]


class Samples(Protocol):
    """Images and their labels, wherever they are: a `Split` in memory, or `Streamed` from files."""

    @property
    def labels(self) -> Tensor:
        """The class of each image, int64 of shape (N,)."""

    @property
    def device(self) -> torch.device:
        """Where images are when they are used."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height and width."""

    @property
    def size(self) -> int:
        """The number of images."""

    def to(self, device: torch.device | str, advance: Advance = ...) -> "Samples":
        """The same samples for use on `device`, in memory where they are to be there."""

    def take(self, indices: Tensor) -> "Samples":
        """Those at `indices`, int64 of shape (M,) on any device, in their order."""

    def loaded(self) -> "Split":
        """All of them, in memory."""

    def fetch(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each of `parts`, indices on the device of `labels`, its images as bytes, and labels.

        Both are on `device`.
        """

    def digest(self, advance: Advance = ...) -> str:
        """What tells the data from others."""


class Split(NamedTuple):
    """Images, uint8 of shape (N, C, H, W), and their labels, int64 of shape (N,), on one device.

    A tuple of two, so `len` is 2; the number of images is `size`.
    """

    images: Tensor
    labels: Tensor

    @property
    def device(self) -> torch.device:
        """Where both are."""
        return self.images.device

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height and width."""
        return tuple(self.images.shape[1:])

    @property
    def size(self) -> int:
        """The number of images."""
        return len(self.labels)

    def to(self, device: torch.device | str, advance: Advance = unreported) -> "Split":
        """The same split on `device`."""
        advance(self.size)
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, indices: Tensor) -> "Split":
        """A copy of the images at `indices`, int64 of shape (M,) on any device, in their order."""
        here = indices.to(self.labels.device)
        return Split(self.images[here], self.labels[here])

    def loaded(self) -> "Split":
        """The split itself."""
        return self

    def fetch(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels at each of `parts`, indices on the device of the split."""
        for part in parts:
            yield self.images[part], self.labels[part]

    def digest(self, advance: Advance = unreported) -> str:
        """SHA-256, in hexadecimal, of the bytes of the images followed by those of the labels."""
        sha = hashlib.sha256()
        for part in self:
            sha.update(part.contiguous().cpu().numpy().data)
        advance(self.size)
        return sha.hexdigest()


def as_input(images: Tensor) -> Tensor:
    """Images of bytes (0 to 255) as float32 in [0, 1], on the device where they are."""
    return images.to(torch.float32) / 255


def hold_out(train: Samples, validation: float, seed: int) -> tuple[Samples, Samples]:
    """Split `train` at random into a training and a validation part, which may be empty.

    `validation` below 1 is a share of `train`, from 1 on it is a number of images. The draw depends
    on `seed` and the number of images alone; both parts keep the order of `train`.

    Raises
    ------
    InputError
        If nothing would be left to train on.
    """
    count = round(validation * train.size) if validation < 1 else int(validation)
    allowed = f"small enough to leave some of the {train.size} training images to train on"
    ranges.require(count < train.size, "validation", validation, allowed)
    order = torch.randperm(train.size, generator=generator_for(seed, "validation split"))
    return train.take(order[count:].sort().values), train.take(order[:count].sort().values)
