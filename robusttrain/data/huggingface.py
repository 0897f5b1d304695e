"""Data sets of the Hugging Face Hub, and folders that its package `datasets` reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robusttrain import ranges
from robusttrain.data import hub, labels
from robusttrain.data._base import _Base
from robusttrain.data.decoding import Decoder, upright_size
from robusttrain.data.labels import Origin
from robusttrain.data.split import Info, Split
from robusttrain.errors import InputError
from robusttrain.runtime import free_memory

# Columns of labels that do not say that they are.
LABELS = ("label", "labels", "target", "class")


@dataclass
class HuggingFace(_Base):
    """Images of the Hugging Face Hub, or of a folder, read by the package `datasets`.

    Images are decoded into memory as those of `Folder` are: upright, transparent ones on white.

    Parameters
    ----------
    path
        A folder, or the name of a data set on the Hub. A folder holds what `save_to_disk` of
        `datasets` has written, or files that `load_dataset` reads, such as parquet files or folders
        of images by split and class.
    name, revision
        Configuration and version of a data set on the Hub. If not given, the main ones.
    train_split
        The split with the training images.
    test_split
        The split with the test images. If not given, it is `test`. If there is no other split than
        that of the training, the test images are drawn from it.
    image_column, label_column
        The columns of images and labels. If not given, there must be one with images, and one with
        classes or called `label`.
    image_size
        Side of the images, in pixels. The shorter side is resized to it (bilinear, antialiased),
        and the central square is kept. If not given, all images must have the same size.
    channels
        1 for grey images, 3 for RGB.
    seed
        Seed of the draw of the test set.
    test_share
        Share of each class in that test set, between 0 and 1, at least one image.
    data_dir
        The folder in which downloaded data sets are kept, in its folder `huggingface`.
    download
        Whether a data set of the Hub is downloaded if it is not there yet.
    """

    path: str
    name: str | None = None
    revision: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    image_size: int | None = None
    channels: int = 3
    seed: int = 0
    test_share: float = 0.2
    data_dir: str = "data"
    download: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size is not None:
            ranges.at_least(1, image_size=self.image_size)
        ranges.require(self.channels in (1, 3), "channels", self.channels, "1 or 3")
        ranges.inside(0, 1, test_share=self.test_share)

    def unused(self) -> dict[str, str]:
        """Name and version of a folder, and the draw of a test set whose split is given."""
        found = {}
        if self._folder.is_dir():
            found = {"name": "path", "revision": "path", "download": "path"}
        if self.test_split is not None or self._has_test():
            cause = "path" if self.test_split is None else "test_split"
            found |= {"seed": cause, "test_share": cause}
        return found

    def _has_test(self) -> bool:
        """Whether a folder has a split for the test."""
        # Whatever is wrong is reported when the images are read.
        try:
            return self._folder.is_dir() and self._test_split() is not None
        except InputError:
            return False

    def info(self) -> Info:
        found = self._found
        return Info(found.decoder.shape, len(found.names), found.names)

    def load(self) -> tuple[Split, Split]:
        return self._decoded(self._found.train), self._decoded(self._found.test)

    def test_positions(self) -> Tensor:
        """The position of each test image in its split, int64 (N,)."""
        return torch.from_numpy(self._found.test.rows)

    @property
    def _folder(self) -> Path:
        return Path(self.path).expanduser()

    @property
    def _origin(self) -> Origin:
        return Origin("dataset.path", self.path)

    @cached_property
    def _found(self) -> "_Found":
        train = self._split(self.train_split, "train_split")
        image, label = self._image_column(train), self._label_column(train)
        values, named = hub.labels_of(train, label)
        names = labels.class_names(values, named)
        numbers = labels.numbered(values, names, self._origin)
        if named is None:
            labels.refuse_gaps(numbers, self._origin, "")
        decoder = Decoder(self._image_shape(train, image), self.image_size is not None)
        chosen = self._test_split()
        if chosen is not None:
            test = self._split(chosen, "test_split")
            theirs = labels.numbered(hub.labels_of(test, label)[0], names, self._origin)
            parts = (_Part(train, image, numbers), _Part(test, image, theirs))
            return _Found(*parts, names, decoder)
        is_test = labels.drawn_test(numbers, names, self.test_share, self.seed, self._origin)
        whole = _Part(train, image, numbers)
        return _Found(whole.at(~is_test), whole.at(is_test), names, decoder)

    @cached_property
    def _splits(self) -> Mapping[str, Any]:
        """All splits by their names; those of the Hub are kept in `data_dir`."""
        kept, folder = Path(self.data_dir).expanduser() / "huggingface", self._folder
        if not folder.is_dir():
            online = hub.Online(self.path, self.name, self.revision)
            folder = hub.downloaded(online, kept, self._origin, allowed=self.download)
        found = hub.read(folder, kept, self._origin)
        return found if isinstance(found, dict) else {self.train_split: found}

    def _split(self, name: str, key: str) -> Any:
        splits = self._splits
        if name not in splits:
            allowed = f"one of {', '.join(splits)}"
            raise InputError(f"dataset.{key}", name, allowed)
        if not len(splits[name]):
            raise InputError(f"dataset.{key}", name, problem="has no images")
        return splits[name]

    def _test_split(self) -> str | None:
        """The split for the test; None if it is to be drawn."""
        others = [name for name in self._splits if name != self.train_split]
        if self.test_split is not None or not others:
            return self.test_split
        if "test" in others:
            return "test"
        problem = f"has no split test, but {', '.join(others)}"
        raise self._origin.error(problem, f"give dataset.test_split={others[0]}")

    def _image_column(self, data: Any) -> str:
        datasets = hub.package()
        fitting = [n for n, kind in data.features.items() if isinstance(kind, datasets.Image)]
        return self._column("image_column", self.image_column, fitting, fitting, "images")

    def _label_column(self, data: Any) -> str:
        datasets = hub.package()
        kinds = data.features
        classes = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
        called = [name for name in LABELS if name in kinds]
        found = classes or called[:1]
        return self._column("label_column", self.label_column, found, list(kinds), "labels")

    def _column(
        self, key: str, given: str | None, found: list[str], allowed: list[str], what: str
    ) -> str:
        if given is not None:
            listed = f"one of {', '.join(allowed)}" if allowed else f"a column of {what}"
            ranges.require(given in allowed, f"dataset.{key}", given, listed)
            return given
        if len(found) != 1:
            problem = f"has {', '.join(found) or 'no column'} for {what}"
            raise self._origin.error(problem, f"choose a column with dataset.{key}")
        return found[0]

    def _image_shape(self, train: Any, column: str) -> tuple[int, int, int]:
        if self.image_size is not None:
            return self.channels, self.image_size, self.image_size
        for _, image in hub.images(train, column, np.arange(1), self._origin):
            width, height = upright_size(image)
        return self.channels, height, width

    def _decoded(self, part: "_Part") -> Split:
        decoder = self._found.decoder
        size = len(part.rows) * prod(decoder.shape)
        if not free_memory.fits(size, torch.device("cpu"), share=1):
            problem = f"has images of {size / 1e9:.3g} GB, more than the free memory"
            raise self._origin.error(problem, "give a smaller dataset.image_size")
        pixels = np.empty((len(part.rows), *decoder.shape), np.uint8)
        images = hub.images(part.data, part.column, part.rows, self._origin)
        for place, (name, image) in enumerate(images):
            pixels[place] = decoder.converted(image, name)
        return Split(torch.from_numpy(pixels), torch.from_numpy(part.labels))


class _Part(NamedTuple):
    """The images of a split in a column, with their labels; `chosen` is None for all of them."""

    data: Any
    column: str
    labels: NDArray[np.int64]
    chosen: NDArray[np.int64] | None = None

    @property
    def rows(self) -> NDArray[np.int64]:
        """The rows of the images in their split, (N,)."""
        return np.arange(len(self.labels)) if self.chosen is None else self.chosen

    def at(self, wanted: NDArray[np.bool_]) -> "_Part":
        """Those images that are `wanted`, (N,)."""
        rows = np.flatnonzero(wanted)
        return self._replace(labels=self.labels[rows], chosen=rows)


class _Found(NamedTuple):
    """The images of each split, the names of the classes, and how images are decoded."""

    train: _Part
    test: _Part
    names: tuple[str, ...]
    decoder: Decoder
