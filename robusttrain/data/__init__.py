"""Data sets: bytes in the memory of the training device, or streamed from files."""

from typing import Protocol

from robusttrain.data.augment import augment
from robusttrain.data.batching import batch_count, batches, bounds, portions
from robusttrain.data.extra import Batches, Extended, Extra, extra_samples, own_images
from robusttrain.data.image_index import FromFiles, ImageIndex, Published, image_index
from robusttrain.data.mapped import Mapped
from robusttrain.data.split import Info, Samples, Split, as_input, hold_out
from robusttrain.data.streamed import Streamed

__all__ = [
    "Batches",
    "Dataset",
    "Extended",
    "Extra",
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
    "extra_samples",
    "hold_out",
    "image_index",
    "own_images",
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
