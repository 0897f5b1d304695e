"""A data set from a folder of image files."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from robusttrain import ranges
from robusttrain.data._base import _Base
from robusttrain.data.decoding import Decoder, open_image
from robusttrain.data.split import Info
from robusttrain.data.streamed import Paths, Streamed, default_workers
from robusttrain.errors import InputError
from robusttrain.seeding import generator_for

# The extensions of torchvision's ImageFolder; repeated here to avoid the import of torchvision.
IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
)  # fmt: skip
LAYOUT = "<path>/<class>/* or <path>/train/<class>/* with <path>/test/<class>/*"


class _Class(NamedTuple):
    """The images of a class: their folder, and their sorted file names."""

    folder: Path
    names: list[str]


# The classes by name, in order.
Listing = Mapping[str, _Class]


@dataclass
class Folder(_Base):
    """Images in one folder per class, in `path`/<class>/ or `path`/train/<class>/ and .../test/.

    Hidden files and files that are not images are ignored.

    Parameters
    ----------
    path
        The folder.
    image_size
        Side of the images, in pixels. The shorter side is resized to it (bilinear, antialiased),
        and the central square is kept. If not given, all images must have the same size.
    channels
        1 for grey images, 3 for RGB.
    seed
        Seed of the draw of the test set, if there is no folder `test`.
    test_share
        Share of each class in that test set, between 0 and 1, at least one image.
    stream
        Whether the images stay in their files, and each batch is decoded when it is needed; the
        results are the same. `auto` does so if all images would take more than half of the free
        memory.
    workers
        Processes that decode in advance. If not given, one for each core, at most 8 (outside of
        Linux 0).
    """

    path: str
    image_size: int | None = None
    channels: int = 3
    seed: int = 0
    test_share: float = 0.2
    stream: bool | str = "auto"
    workers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size is not None:
            ranges.at_least(1, image_size=self.image_size)
        ranges.require(self.channels in (1, 3), "channels", self.channels, "1 or 3")
        ranges.inside(0, 1, test_share=self.test_share)
        ranges.require(
            self.stream in (True, False, "auto"), "stream", self.stream, "true, false or auto"
        )
        if self.workers is not None:
            ranges.at_least(0, workers=self.workers)

    def unused(self) -> dict[str, str]:
        """The draw of the test set, if there is a folder with one."""
        draws = not self._has_test_folder()
        return {} if draws else {"seed": "path", "test_share": "path"}

    def info(self) -> Info:
        train, _ = self._list()
        return Info(self._image_shape(train), len(train), tuple(train))

    def load(self) -> tuple[Streamed, Streamed]:
        """The training and the test set, which are decoded when they move to a device."""
        train, test = self._list()
        decoder = Decoder(self._image_shape(train), self.image_size is not None)
        return self._streamed(train, decoder), self._streamed(test, decoder)

    def _list(self) -> tuple[Listing, Listing]:
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise InputError("dataset.path", self.path, f"expected {LAYOUT}", "is not a folder")
        if not self._has_test_folder():
            return self._draw_test(self._classes(root))
        train, test = self._classes(root / "train"), self._classes(root / "test")
        if train.keys() != test.keys():
            alone = ", ".join(sorted(train.keys() ^ test.keys()))
            problem = f"has different classes in train and test; in one alone: {alone}"
            raise InputError("dataset.path", self.path, problem=problem)
        return train, test

    def _has_test_folder(self) -> bool:
        root = Path(self.path).expanduser()
        return all((root / part).is_dir() for part in ("train", "test"))

    def _classes(self, folder: Path) -> Listing:
        folders = sorted(child for child in folder.iterdir() if _is_class(child))
        if len(folders) < 2:
            problem = f"needs two class folders or more, {folder} has {len(folders)}"
            raise InputError("dataset.path", self.path, f"expected {LAYOUT}", problem)
        listing = {folder.name: _Class(folder, _images(folder)) for folder in folders}
        for name, images in listing.items():
            if not images.names:
                problem = f"has an empty image folder {folder / name}"
                raise InputError("dataset.path", self.path, f"expected {LAYOUT}", problem)
        return listing

    def _draw_test(self, classes: Listing) -> tuple[Listing, Listing]:
        train, test = {}, {}
        for name, (folder, files) in classes.items():
            if len(files) < 2:
                problem = f"has one image of class {name}"
                allowed = "two are needed to train on one and test on the other"
                raise InputError("dataset.path", self.path, allowed, problem)
            count = min(max(1, round(self.test_share * len(files))), len(files) - 1)
            # A stream per class, so that a new class does not change the test images of the others.
            generator = generator_for(self.seed, f"folder test split {name}")
            order = torch.randperm(len(files), generator=generator).tolist()
            test[name] = _Class(folder, [files[index] for index in sorted(order[:count])])
            train[name] = _Class(folder, [files[index] for index in sorted(order[count:])])
        return train, test

    def _image_shape(self, train: Listing) -> tuple[int, int, int]:
        if self.image_size is not None:
            return self.channels, self.image_size, self.image_size
        folder, names = next(iter(train.values()))
        with open_image(str(folder / names[0])) as image:
            return self.channels, image.height, image.width

    def _streamed(self, listing: Listing, decoder: Decoder) -> Streamed:
        paths = Paths((str(folder), names) for folder, names in listing.values())
        counts = torch.tensor([len(names) for _, names in listing.values()])
        labels = torch.arange(len(listing)).repeat_interleave(counts)
        workers = default_workers() if self.workers is None else self.workers
        stream = self.stream if isinstance(self.stream, bool) else None
        return Streamed(paths, np.arange(len(paths)), labels, decoder, stream, workers)


def _is_class(folder: Path) -> bool:
    return folder.is_dir() and not folder.name.startswith(".")


def _images(folder: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.name.lower().endswith(IMAGE_EXTENSIONS) and not entry.name.startswith(".")
    )
