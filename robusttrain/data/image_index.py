"""How the images of a test set are found in the data set as it is published."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from robusttrain.errors import InputError

# What positions count: all images of the data set as published, or those of its test set.
DATA_SET, TEST_SET = "data set", "test set"


@runtime_checkable
class Published(Protocol):
    """A data set whose test images are some of the images of a published data set."""

    def test_positions(self) -> Tensor:
        """The position of each test image in the published data set, integers (N,) from 0."""


@runtime_checkable
class FromFiles(Protocol):
    """A data set with a file for each image, which reports what it has read."""

    def test_files(self) -> Sequence[str]:
        """The name of the file of each test image, in the order of the test set."""

    def contents(self) -> Mapping[str, Any]:
        """What the manifest of a run has about the files that were not read."""

    def summary(self) -> str:
        """What was read and what was not, in one line."""


class ImageIndex(NamedTuple):
    """How the images of a test set are found again.

    Parameters
    ----------
    positions
        The position of each image, int64 (N,).
    counted_in
        What the positions count: `DATA_SET` or `TEST_SET`.
    files
        The name of the file of each image, if the images are files.
    """

    positions: Tensor
    counted_in: str
    files: Sequence[str] | None


def image_index(dataset: object, size: int) -> ImageIndex:
    """How the test images of `dataset` are found again, of which there are `size`.

    Raises
    ------
    InputError
        If the positions of a `Published` data set are not `size` different numbers.
    """
    files = dataset.test_files() if isinstance(dataset, FromFiles) else None
    if not isinstance(dataset, Published):
        return ImageIndex(torch.arange(size), TEST_SET, files)
    positions = dataset.test_positions()
    different = len(set(positions.tolist()))
    if not different == len(positions) == size:
        problem = f"returns {len(positions)} positions, {different} of them different"
        allowed = f"it must be a position for each of the {size} test images"
        raise InputError("dataset.test_positions", allowed=allowed, problem=problem)
    return ImageIndex(positions, DATA_SET, files)
