"""A data set from a folder of image files."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from robusttrain import ranges
from robusttrain.data._base import _Base
from robusttrain.data.decoding import (
    Decoder,
    can_be_decoded,
    open_image,
    refused,
    shortened,
    upright_size,
)
from robusttrain.data.listing import ClassFiles, Listing, listed
from robusttrain.data.split import Info
from robusttrain.data.streamed import Paths, Streamed, default_workers
from robusttrain.errors import InputError
from robusttrain.seeding import generator_for

# Classes that the line about a data set names.
MOST_NAMES = 5


@dataclass
class Folder(_Base):
    """Images in one folder per class, in `path`/<class>/ or `path`/train/<class>/ and .../test/.

    Images may lie in folders of their class folder. Images are turned upright as their EXIF data
    says, transparent ones are shown on `background`, and of moving ones the first frame is taken.
    Hidden files and files that are not images are counted, and not read.

    Parameters
    ----------
    path
        The folder.
    image_size
        Side of the images, in pixels. The shorter side is resized to it (bilinear, antialiased),
        and the central square is kept. If not given, all images must have the same size.
    channels
        1 for grey images, 3 for RGB.
    background
        Brightness of the background of transparent images, from 0 (black) to 1 (white).
    skip_unreadable
        Whether images that cannot be decoded are left out, and counted. All images are then decoded
        once at the start, also if they are streamed. Otherwise such images are refused.
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
    background: float = 1.0
    skip_unreadable: bool = False
    seed: int = 0
    test_share: float = 0.2
    stream: bool | str = "auto"
    workers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size is not None:
            ranges.at_least(1, image_size=self.image_size)
        ranges.require(self.channels in (1, 3), "channels", self.channels, "1 or 3")
        ranges.within(0, 1, background=self.background)
        ranges.inside(0, 1, test_share=self.test_share)
        ranges.require(
            self.stream in (True, False, "auto"), "stream", self.stream, "true, false or auto"
        )
        if self.workers is not None:
            ranges.at_least(0, workers=self.workers)

    def unused(self) -> dict[str, str]:
        """The draw of the test set, if there is a folder with one."""
        root = Path(self.path).expanduser()
        draws = not all((root / part).is_dir() for part in ("train", "test"))
        return {} if draws else {"seed": "path", "test_share": "path"}

    def info(self) -> Info:
        train = self._found.train
        return Info(self._image_shape(train), len(train), tuple(train))

    def load(self) -> tuple[Streamed, Streamed]:
        """The training and the test set, which are decoded when they move to a device."""
        found = self._found
        background = round(255 * self.background)
        decoder = Decoder(self._image_shape(found.train), self.image_size is not None, background)
        return self._streamed(found.train, decoder), self._streamed(found.test, decoder)

    def test_files(self) -> list[str]:
        """The path of each test image, relative to `path`, in the order of the test set."""
        root = Path(self.path).expanduser()
        return [
            (folder / name).relative_to(root).as_posix()
            for folder, names in self._found.test.values()
            for name in names
        ]

    def contents(self) -> dict[str, Any]:
        """What else lies in the folder: counts of what is not read, and the skipped images."""
        found = self._found
        return {"passed_over": dict(found.passed_over), "unreadable": found.unreadable}

    def summary(self) -> str:
        """What was read and what was not, in one line."""
        found = self._found
        names = list(found.train)
        listed = ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")
        train, test = (
            sum(len(c.names) for c in part.values()) for part in (found.train, found.test)
        )
        drawn = f" (dataset.test_share={self.test_share:g} of each class)" if found.drawn else ""
        parts = [
            f"dataset.path={self.path} has {len(names)} classes ({listed})",
            f"{train} training and {test} test images{drawn}",
        ]
        if found.passed_over:
            counts = (f"{count} {kind}" for kind, count in sorted(found.passed_over.items()))
            parts.append(f"not read: {', '.join(counts)}")
        if found.unreadable:
            parts.append(f"skipped as unreadable: {shortened(found.unreadable)}")
        return "; ".join(parts)

    @cached_property
    def _found(self) -> "_Found":
        folders = listed(self.path)
        unreadable: list[str] = []
        parts = [part for part in (folders.train, folders.test) if part is not None]
        if self.skip_unreadable:
            parts = [self._readable(part, unreadable) for part in parts]
        train, test = parts if len(parts) == 2 else self._draw_test(parts[0])
        return _Found(train, test, len(parts) == 1, folders.passed_over, unreadable)

    def _readable(self, listing: Listing, unreadable: list[str]) -> Listing:
        """The classes without images that cannot be decoded, which are added to `unreadable`."""
        kept = {}
        with ThreadPoolExecutor() as pool:
            for name, (folder, names) in listing.items():
                fine = list(pool.map(can_be_decoded, (f"{folder}/{image}" for image in names)))
                bad = [image for image, is_fine in zip(names, fine, strict=True) if not is_fine]
                unreadable += [f"{folder}/{image}" for image in bad]
                kept[name] = ClassFiles(folder, [image for image in names if image not in set(bad)])
                if not kept[name].names:
                    problem = f"has no readable image in {folder}"
                    raise InputError("dataset.path", self.path, problem=problem)
        return kept

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
            test[name] = ClassFiles(folder, [files[index] for index in sorted(order[:count])])
            train[name] = ClassFiles(folder, [files[index] for index in sorted(order[count:])])
        return train, test

    def _image_shape(self, train: Listing) -> tuple[int, int, int]:
        if self.image_size is not None:
            return self.channels, self.image_size, self.image_size
        errors = []
        for path in (f"{folder}/{name}" for folder, names in train.values() for name in names):
            try:
                with open_image(path) as image:
                    width, height = upright_size(image)
                return self.channels, height, width
            # Reported with all others when the files are read.
            except InputError as error:
                errors.append(error)
        raise refused(errors)

    def _streamed(self, listing: Listing, decoder: Decoder) -> Streamed:
        paths = Paths((str(folder), names) for folder, names in listing.values())
        counts = torch.tensor([len(names) for _, names in listing.values()])
        labels = torch.arange(len(listing)).repeat_interleave(counts)
        workers = default_workers() if self.workers is None else self.workers
        stream = self.stream if isinstance(self.stream, bool) else None
        return Streamed(paths, np.arange(len(paths)), labels, decoder, stream, workers)


class _Found(NamedTuple):
    """The classes of each split, and what is not read.

    `drawn` is whether the test set was drawn from the training images.
    """

    train: Listing
    test: Listing
    drawn: bool
    passed_over: Mapping[str, int]
    unreadable: list[str]
