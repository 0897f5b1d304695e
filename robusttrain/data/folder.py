"""An image folder of the user's own."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from robusttrain import ranges
from robusttrain.data._base import _Base
from robusttrain.data.split import Info, Split
from robusttrain.errors import InputError
from robusttrain.streams import stream

if TYPE_CHECKING:
    from PIL.Image import Image

# Those of torchvision's ImageFolder, written out so that listing a folder imports no torchvision.
IMAGE_EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
)
LAYOUT = "<path>/<class>/* or <path>/train/<class>/* with <path>/test/<class>/*"
# Few enough to keep all threads busy to the end, many enough to hide the cost of a task.
FILES_PER_TASK = 64

# The images of each class, by the name of its folder; both in the order of their names.
Listing = dict[str, list[Path]]


@dataclass
class Folder(_Base):
    """Images in one folder per class, in `path`/<class>/ or `path`/train/<class>/ and .../test/.

    Without a folder `test`, the share `test_share` of each class is drawn from `seed` as test set,
    at least one image. Images become grey (`channels` 1) or RGB (3). With `image_size`, the shorter
    side is resized to that many pixels (bilinear, antialiased) and the central square kept;
    without, all must have one size. Hidden files and files that are no images are passed over.
    """

    path: str
    image_size: int | None = None
    channels: int = 3
    seed: int = 0
    test_share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size is not None:
            ranges.at_least(1, image_size=self.image_size)
        ranges.require(self.channels in (1, 3), "channels", self.channels, "1 or 3")
        ranges.inside(0, 1, test_share=self.test_share)

    def info(self) -> Info:
        train, _ = self._list()
        return Info(self._image_shape(train), len(train), tuple(train))

    def load(self) -> tuple[Split, Split]:
        train, test = self._list()
        shape = self._image_shape(train)
        return self._decode(train, shape), self._decode(test, shape)

    def _list(self) -> tuple[Listing, Listing]:
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise InputError(f"dataset.path={self.path} is not a folder: expected {LAYOUT}")
        if not all((root / part).is_dir() for part in ("train", "test")):
            return self._draw_test(self._classes(root))
        train, test = self._classes(root / "train"), self._classes(root / "test")
        if train.keys() != test.keys():
            raise InputError(
                f"dataset.path={self.path}: train and test have different classes; "
                f"in one alone: {', '.join(sorted(train.keys() ^ test.keys()))}"
            )
        return train, test

    def _classes(self, folder: Path) -> Listing:
        folders = sorted(child for child in folder.iterdir() if _is_class(child))
        if len(folders) < 2:
            raise InputError(
                f"dataset.path={self.path}: two class folders or more are needed, "
                f"{folder} has {len(folders)}: expected {LAYOUT}"
            )
        listing = {folder.name: _images(folder) for folder in folders}
        for name, files in listing.items():
            if not files:
                raise InputError(
                    f"dataset.path={self.path}: empty image folder {folder / name}: "
                    f"expected {LAYOUT}"
                )
        return listing

    def _draw_test(self, classes: Listing) -> tuple[Listing, Listing]:
        train: Listing = {}
        test: Listing = {}
        for name, files in classes.items():
            if len(files) < 2:
                raise InputError(
                    f"dataset.path={self.path}: class {name} has one image, "
                    "two are needed to train on one and test on the other"
                )
            count = min(max(1, round(self.test_share * len(files))), len(files) - 1)
            # A stream per class: a new class leaves the test images of the others as they were.
            generator = stream(self.seed, f"folder test split {name}")
            order = torch.randperm(len(files), generator=generator).tolist()
            test[name] = [files[index] for index in sorted(order[:count])]
            train[name] = [files[index] for index in sorted(order[count:])]
        return train, test

    def _image_shape(self, train: Listing) -> tuple[int, int, int]:
        if self.image_size is not None:
            return self.channels, self.image_size, self.image_size
        with _opened(next(iter(train.values()))[0]) as image:
            return self.channels, image.height, image.width

    def _decode(self, listing: Listing, shape: tuple[int, int, int]) -> Split:
        files = [file for part in listing.values() for file in part]
        labels = [label for label, part in enumerate(listing.values()) for _ in part]
        pixels = np.empty((len(files), *shape), np.uint8)

        def fill(start: int) -> None:
            for index, file in enumerate(files[start : start + FILES_PER_TASK], start):
                pixels[index] = self._pixels(file, shape)

        with ThreadPoolExecutor() as pool:
            # In order, so that of several bad files always the same one is named.
            for _ in pool.map(fill, range(0, len(files), FILES_PER_TASK)):
                pass
        return Split(torch.from_numpy(pixels), torch.tensor(labels))

    def _pixels(self, file: Path, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
        """The image as uint8 of `shape`, (C, H, W)."""
        from PIL import Image, ImageOps

        channels, height, width = shape
        with _opened(file) as image:
            _refuse_deep(image, file)
            image = image.convert("L" if channels == 1 else "RGB")
            if self.image_size is not None:
                image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
            if image.size != (width, height):
                raise InputError(
                    f"{file} has {image.width}x{image.height} pixels, the first image has "
                    f"{width}x{height}: set dataset.image_size={min(width, height)}, say, "
                    "to bring all to one size"
                )
            return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def _is_class(folder: Path) -> bool:
    return folder.is_dir() and not folder.name.startswith(".")


def _images(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in IMAGE_EXTENSIONS and not file.name.startswith(".")
    )


@contextmanager
def _opened(file: Path) -> "Iterator[Image]":
    """The image in `file`; any failure to open or decode it inside the block names the file."""
    from PIL import Image

    # Broken files raise OSError, SyntaxError, ValueError, struct.error, ... by format.
    try:
        with Image.open(file) as image:
            yield image
    except InputError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{file}: unreadable image ({reason}): replace or delete it") from error


def _refuse_deep(image: "Image", file: Path) -> None:
    # PIL converts these by clipping at 255, which turns most pictures white without a word.
    if image.mode.startswith(("I", "F")):
        raise InputError(f"{file} has pixels of mode {image.mode}: convert it to 8 bits a channel")
