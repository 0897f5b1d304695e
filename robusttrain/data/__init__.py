"""Data sets: bytes in the memory of the training device, or streamed from files."""

from typing import Protocol

from robusttrain.data.augment import augment
from robusttrain.data.batching import batch_count, batches, bounds, portions
from robusttrain.data.image_index import FromFiles, ImageIndex, Published, image_index
from robusttrain.data.mapped import Mapped
from robusttrain.data.split import Info, Samples, Split, as_input, hold_out
from robusttrain.data.streamed import Streamed

__all__ = [
    "Dataset",
    "FromFiles",
    "ImageIndex",
    "Info",
    "Mapped",
    "Published",
    "Samples",
    "Split",
    "Streamed",
    "as_input",
    "augment",
    "batch_count",
    "batches",
    "bounds",
    "hold_out",
    "image_index",
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
        """The training and the test set, each a `Split` on the CPU, `Streamed` or `Mapped`.

        Raises
        ------
        InputError
            If the files are missing or cannot be read.
        """
