"""Data sets: as bytes on the device that trains on them, or streamed from files to there."""

from typing import Protocol

from robusttrain.data.augment import augment
from robusttrain.data.batching import batch_count, batches, bounds, portions
from robusttrain.data.split import Info, Samples, Split, as_input, hold_out
from robusttrain.data.streamed import Streamed

__all__ = [
    "Dataset",
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
    """A data set and how to train on it: `validation` is for `hold_out`, the rest for `augment`."""

    validation: float
    crop: int
    flip: bool

    def info(self) -> Info:
        """Shape and classes, without reading the images."""

    def load(self) -> tuple[Samples, Samples]:
        """The training and the test set: a `Split` on the CPU each, or `Streamed`.

        Raises
        ------
        InputError
            If the files are missing or cannot be read.
        """
