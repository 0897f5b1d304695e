"""Data sets: whole in memory, as bytes, on the device that trains on them."""

from typing import Protocol

from robusttrain.data.augment import augment
from robusttrain.data.batching import batch_count, batches, bounds
from robusttrain.data.split import Info, Split, as_input, hold_out

__all__ = [
    "Dataset",
    "Info",
    "Split",
    "as_input",
    "augment",
    "batch_count",
    "batches",
    "bounds",
    "hold_out",
]


class Dataset(Protocol):
    """A data set and how to train on it: `validation` is for `hold_out`, the rest for `augment`."""

    validation: float
    crop: int
    flip: bool

    def info(self) -> Info:
        """Shape and classes, without reading the images."""

    def load(self) -> tuple[Split, Split]:
        """The training and the test set, on the CPU.

        Raises
        ------
        InputError
            If the files are missing or cannot be read.
        """
