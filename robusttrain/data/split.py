"""Samples of a data set: uint8 images and int64 labels."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from robusttrain import ranges
from robusttrain.runtime.progress import Advance, unreported
from robusttrain.seeding import generator_for


class Info(NamedTuple):
    """Properties of a data set that are known before its images are read.

    Parameters
    ----------
    image_shape
        (channels, height, width).
    num_classes
        Number of classes.
    class_names
        The name of each class, in the order of the labels.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]


class Samples(Protocol):
    """Images with labels: a `Split` in memory, `Streamed` from files, or `Mapped`."""

    @property
    def labels(self) -> Tensor:
        """The class of each image, int64 of shape (N,)."""

    @property
    def device(self) -> torch.device:
        """The device on which the images are used."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height and width."""

    @property
    def size(self) -> int:
        """The number of images."""

    def to(self, device: torch.device | str, advance: Advance = ...) -> "Samples":
        """The same samples for use on `device`; streamed ones may be loaded into its memory."""

    def take(self, indices: Tensor) -> "Samples":
        """The samples at `indices`, int64 of shape (M,) on any device, in that order."""

    def loaded(self) -> "Split":
        """All samples, in memory."""

    def fetch(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each of `parts`, the images as bytes (M, C, H, W), and the labels (M,), on `device`.

        A part holds indices (M,), on the device of `labels`.
        """

    def digest(self, advance: Advance = ...) -> str:
        """A checksum that identifies the data."""


class Split(NamedTuple):
    """Images, uint8 of shape (N, C, H, W), and labels, int64 of shape (N,), on one device.

    A Python program may also give images as floats in [0, 1].

    It is a tuple of two, so `len` is 2; the number of images is `size`.
    """

    images: Tensor
    labels: Tensor

    @property
    def device(self) -> torch.device:
        """The device of images and labels."""
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
        """A copy of the samples at `indices`, int64 of shape (M,) on any device, in that order."""
        here = indices.to(self.labels.device)
        return Split(self.images[here], self.labels[here])

    def loaded(self) -> "Split":
        """This split."""
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
    """Convert images from bytes (0 to 255) to float32 in [0, 1], on their device; floats stay."""
    return images if images.is_floating_point() else images.to(torch.float32) / 255


def hold_out(train: Samples, validation: float, seed: int) -> tuple[Samples, Samples]:
    """Split `train` at random into a training and a validation part; the latter may be empty.

    The draw depends only on `seed` and the number of images. Both parts keep the order of `train`.

    Parameters
    ----------
    train
        The training set.
    validation
        Below 1 a share of `train`, from 1 on a number of images.
    seed
        The seed of the run.

    Raises
    ------
    InputError
        If no image would remain for training.
    """
    count = round(validation * train.size) if validation < 1 else int(validation)
    allowed = f"small enough to leave some of the {train.size} training images to train on"
    ranges.require(count < train.size, "validation", validation, allowed)
    order = torch.randperm(train.size, generator=generator_for(seed, "validation split"))
    return train.take(order[count:].sort().values), train.take(order[:count].sort().values)
