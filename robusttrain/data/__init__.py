"""Data sets: bytes in the memory of the training device, or streamed from files."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from robusttrain.data.augment import augment
from robusttrain.data.batching import batch_count, batches, bounds, portions
from robusttrain.data.split import Info, Samples, Split, as_input, hold_out
from robusttrain.data.streamed import Streamed

__all__ = [
    "Dataset",
    "FromFiles",
    "Info",
    "Samples",
    "Split",
    "Streamed",
    "as_input",
    "augment",
    "batch_count",
    "batches",
    "bounds",
    "hold_out",
    "portions",
]


class Dataset(Protocol):
    """A data set, with settings for `hold_out` (`validation`) and `augment` (`crop` and `flip`)."""

    validation: float
    crop: int
    flip: bool

    def info(self) -> Info:
        """Image shape and classes, without reading the images."""

    def load(self) -> tuple[Samples, Samples]:
        """The training and the test set, each a `Split` on the CPU or `Streamed`.

        Raises
        ------
        InputError
            If the files are missing or cannot be read.
        """


@runtime_checkable
class FromFiles(Protocol):
    """A data set with a file for each image, which reports what it has read."""

    def test_files(self) -> Sequence[str]:
        """The name of the file of each test image, in the order of the test set."""

    def contents(self) -> Mapping[str, Any]:
        """What the manifest of a run has about the files that were not read."""

    def summary(self) -> str:
        """What was read and what was not, in one line."""
