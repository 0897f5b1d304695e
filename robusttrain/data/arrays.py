"""A data set from the user's own arrays."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robusttrain import ranges
from robusttrain.data import array_files
from robusttrain.data._base import _Base
from robusttrain.data.array_files import ALONE, LAYOUTS, TEST, TRAIN, Pair, Source
from robusttrain.data.mapped import Mapped
from robusttrain.data.split import Info, Split
from robusttrain.errors import InputError
from robusttrain.seeding import generator_for


@dataclass
class Arrays(_Base):
    """Images and labels in files of NumPy: `.npz` with both, or `.npy` for each.

    Images are bytes (uint8), or floats in [0, 1] that stay floats. Labels are integers from 0, or
    the names of their classes. In a `.npz` file they are called `x` and `y`, `images` and `labels`,
    or `x_train`, `y_train`, `x_test` and `y_test` if the file has both splits. Files with pickled
    objects are refused.

    Parameters
    ----------
    train
        The file of the training images.
    test
        The file of the test images. If it is not given, and `train` has no test images, they are
        drawn from the training images.
    train_labels, test_labels
        The `.npy` files of the labels, if `train` and `test` are such files.
    layout
        Order of the axes: NHWC, NCHW, or NHW for grey images. `auto` tells it from the shape, where
        exactly one axis can be that of 1 or 3 channels.
    num_classes
        Number of classes. If not given, the classes are those from 0 to the largest label, and each
        must have a training image.
    class_names
        Names of the classes, in the order of their labels. They are needed if labels are names,
        unless these are to be counted in the order of the alphabet.
    seed
        Seed of the draw of the test set.
    test_share
        Share of each class in that test set, between 0 and 1, at least one image.
    stream
        Whether the images of a `.npy` file stay there, and are read batch by batch; the results are
        the same. `auto` does so if they would take more than half of the free memory.
    """

    train: str
    test: str | None = None
    train_labels: str | None = None
    test_labels: str | None = None
    layout: str = "auto"
    num_classes: int | None = None
    class_names: list[str] | None = None
    seed: int = 0
    test_share: float = 0.2
    stream: bool | str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.one_of(("auto", *LAYOUTS), layout=self.layout)
        ranges.inside(0, 1, test_share=self.test_share)
        ranges.require(
            self.stream in (True, False, "auto"), "stream", self.stream, "true, false or auto"
        )
        if self.num_classes is not None:
            ranges.at_least(2, num_classes=self.num_classes)
        names = self.class_names
        different = names is None or len(set(names)) == len(names) >= 2
        ranges.require(different, "class_names", names, "two different names or more")

    def unused(self) -> dict[str, str]:
        """The draw of a test set that is given, labels beside `.npz`, and a number of names."""
        found: dict[str, str] = {}
        if self.test is not None or self._has_test_inside():
            cause = "train" if self.test is None else "test"
            found |= {"seed": cause, "test_share": cause}
        if self.train.endswith(".npz"):
            found["train_labels"] = "train"
        if self.test is None or self.test.endswith(".npz"):
            found["test_labels"] = "test"
        if self.class_names is not None:
            found["num_classes"] = "class_names"
        if ".npy" not in (self.train[-4:], (self.test or "")[-4:]):
            found["stream"] = "train"
        return found

    def info(self) -> Info:
        found = self._found
        channels, height, width = found.train.image_shape
        return Info((channels, height, width), len(found.names), found.names)

    def load(self) -> tuple[Split | Mapped, Split | Mapped]:
        """The training and the test set; those in a `.npy` file are read when they are needed."""
        return self._samples(self._found.train), self._samples(self._found.test)

    def test_positions(self) -> Tensor:
        """The row of each test image in the file that it comes from, int64 (N,)."""
        return torch.from_numpy(self._found.test.rows)

    @cached_property
    def _found(self) -> "_Found":
        sources = self._sources()
        train, *others = (array_files.read(source, self.layout) for source in sources)
        names = self._class_names(train, sources[0])
        train = _numbered(train, names, sources[0])
        if self.class_names is None and self.num_classes is None:
            _refuse_gaps(train, sources[0])
        if not others:
            is_test = self._draw_test(train, names)
            rows = np.flatnonzero(~is_test), np.flatnonzero(is_test)
            return _Found(_part(train, rows[0]), _part(train, rows[1]), names)
        test = _numbered(others[0], names, sources[1])
        if test.images.shape[1:] != train.images.shape[1:]:
            ours, theirs = ("x".join(map(str, p.images.shape[1:])) for p in (test, train))
            problem = f"has images of {ours} (channels, height, width)"
            raise InputError(sources[1].key, sources[1].path, f"{theirs}, as in training", problem)
        return _Found(_whole(train), _whole(test), names)

    def _samples(self, part: Mapped) -> Split | Mapped:
        """The part, loaded if its file is an archive, which was read as a whole."""
        if not isinstance(part.images, np.memmap):
            return part.loaded()
        return part._replace(stream=self.stream if isinstance(self.stream, bool) else None)

    def _sources(self) -> list[Source]:
        """The file of the training images and, unless they are to be drawn, of the test images."""
        train = Source("dataset.train", self.train, self.train_labels, (*TRAIN, *ALONE))
        if self.test is not None:
            return [train, Source("dataset.test", self.test, self.test_labels, (*TEST, *ALONE))]
        inside = [train._replace(names=TEST)] if self._has_test_inside() else []
        return [train, *inside]

    def _has_test_inside(self) -> bool:
        source = Source("dataset.train", self.train, None, TEST)
        # What is wrong with the file is reported when it is read.
        try:
            names = set(array_files.names_in(source))
        except InputError:
            return False
        return any(names >= set(pair) for pair in TEST)

    def _class_names(self, train: Pair, source: Source) -> tuple[str, ...]:
        if self.class_names is not None:
            return tuple(self.class_names)
        if train.labels.dtype.kind == "U":
            return tuple(np.unique(train.labels).tolist())
        if self.num_classes is not None:
            return tuple(map(str, range(self.num_classes)))
        return tuple(map(str, range(max(2, int(train.labels.max()) + 1))))

    def _draw_test(self, train: Pair, names: tuple[str, ...]) -> NDArray[np.bool_]:
        """Which of the training images become the test set, (N,)."""
        is_test = np.zeros(len(train.labels), bool)
        for label in np.unique(train.labels):
            rows = np.flatnonzero(train.labels == label)
            if len(rows) == 1:
                problem = f"has one image of class {names[label]}"
                allowed = "two are needed to train on one and test on the other"
                raise InputError("dataset.train", self.train, allowed, problem)
            count = min(max(1, round(self.test_share * len(rows))), len(rows) - 1)
            # A stream per class, so that a new class does not change the test images of the others.
            generator = generator_for(self.seed, f"arrays test split {names[label]}")
            is_test[rows[torch.randperm(len(rows), generator=generator)[:count].numpy()]] = True
        return is_test


class _Found(NamedTuple):
    """The images of each split, and the names of the classes."""

    train: Mapped
    test: Mapped
    names: tuple[str, ...]


def _numbered(pair: Pair, names: tuple[str, ...], source: Source) -> Pair:
    """The pair with labels as int64, which lie within the classes."""
    if pair.labels.dtype.kind == "U":
        unknown = sorted({*pair.labels.tolist()} - {*names})
        if unknown:
            problem = f"has labels that are no class: {', '.join(unknown[:5])}"
            raise InputError(source.key, source.path, f"one of {', '.join(names)}", problem)
        places = {name: place for place, name in enumerate(names)}
        labels = np.array([places[name] for name in pair.labels.tolist()], np.int64)
        return Pair(pair.images, labels)
    low, high = int(pair.labels.min()), int(pair.labels.max())
    if low < 0 or high >= len(names):
        problem = f"has labels from {low} to {high}"
        raise InputError(source.key, source.path, f"from 0 to {len(names) - 1}", problem)
    return Pair(pair.images, pair.labels.astype(np.int64))


def _refuse_gaps(train: Pair, source: Source) -> None:
    """Refuse labels that skip a class, such as those that count from 1."""
    counts = np.bincount(train.labels)
    absent = np.flatnonzero(counts == 0).tolist()
    if absent or len(counts) < 2:
        classes = ", ".join(map(str, absent[:5])) or "1"
        problem = f"has labels up to {len(counts) - 1}, but no image of class {classes}"
        allowed = "count classes from 0 without gaps, or give dataset.num_classes"
        raise InputError(source.key, source.path, allowed, problem)


def _whole(pair: Pair) -> Mapped:
    return _part(pair, np.arange(len(pair.labels)))


def _part(pair: Pair, rows: NDArray[np.int64]) -> Mapped:
    return Mapped(pair.images, rows, torch.from_numpy(pair.labels[rows]))
