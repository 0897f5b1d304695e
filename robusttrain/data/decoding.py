"""Decode image files to bytes of one shape."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from robusttrain.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

# Bytes of a file that its digest covers: all of a small image, enough of a large one.
HEAD = 2**14

# The tag of EXIF data with the orientation of the camera; from 5 on, width and height are swapped.
ORIENTATION, SWAPPED = 0x0112, 5

TRANSPARENT_MODES = ("RGBA", "LA", "PA", "RGBa", "La")

# Files that a message lists.
MOST_FILES = 20


class Decoder(NamedTuple):
    """Decodes files to images of one shape.

    Parameters
    ----------
    shape
        (C, H, W); images become grey if C is 1, and RGB if C is 3.
    fit
        Whether to resize the shorter side and keep the centre. Otherwise other sizes are refused.
    background
        Brightness behind transparent pixels, from 0 to 255.
    """

    shape: tuple[int, int, int]
    fit: bool
    background: int = 255

    def pixels(self, path: str) -> NDArray[np.uint8]:
        """The image in the file `path`, (C, H, W), upright and on the background.

        Raises
        ------
        InputError
            If the file cannot be decoded to such an image; the message names it.
        """
        with open_image(path) as image:
            return self.converted(image, path)

    def converted(self, image: "Image", name: str) -> NDArray[np.uint8]:
        """An open image as pixels (C, H, W), upright and on the background.

        Raises
        ------
        InputError
            If it cannot be converted to the shape; the message has its `name`.
        """
        from PIL import Image, ImageOps

        channels, height, width = self.shape
        image = _upright(image)
        self._refuse(image, name)
        image = _opaque(image, self.background).convert("L" if channels == 1 else "RGB")
        if self.fit:
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)

    def head(self, path: str) -> bytes:
        """The length of the file `path`, in eight bytes, and its first `HEAD` bytes.

        Raises
        ------
        InputError
            If its header shows that `pixels` would refuse it.
        """
        from PIL import Image

        with _errors_naming(path), Path(path).open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            first = file.read(HEAD)
            file.seek(0)
            with Image.open(file) as image:
                self._refuse(image, path)
        return length.to_bytes(8, "little") + first

    def _refuse(self, image: "Image", path: str) -> None:
        """Raise `InputError` if the mode or the size of an image is not allowed."""
        # PIL converts these modes by clipping at 255, which silently turns most images white.
        if image.mode.startswith(("I", "F")):
            problem = f"has pixels of mode {image.mode}"
            raise InputError(str(path), allowed="convert it to 8 bits a channel", problem=problem)
        _, height, width = self.shape
        if not self.fit and upright_size(image) != (width, height):
            size = "x".join(map(str, upright_size(image)))
            problem = f"has {size} pixels, the first image has {width}x{height}"
            better = f"dataset.image_size={min(width, height)}"
            allowed = f"resize all of them, for example with {better}"
            raise InputError(str(path), allowed=allowed, problem=problem)


@contextmanager
def open_image(path: str) -> "Iterator[Image]":
    """Open an image file for the block; errors in opening or decoding become `InputError`."""
    from PIL import Image

    with _errors_naming(path), Image.open(path) as image:
        yield image


def can_be_decoded(path: str) -> bool:
    """Whether the file `path` is an image that can be decoded."""
    try:
        with open_image(path) as image:
            image.load()
    except InputError:
        return False
    return True


def upright_size(image: "Image") -> tuple[int, int]:
    """Width and height of an open image once it is upright."""
    width, height = image.size
    # PIL turns TIFF by itself. Of PNG it would decode all pixels to look for EXIF data behind them.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return width, height
    return (height, width) if _orientation(image) >= SWAPPED else (width, height)


def _orientation(image: "Image") -> int:
    """From 1 (upright) to 8, by its EXIF data."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    # Damaged EXIF data raise any error, and say nothing about the pixels.
    except Exception:
        return 1


def _upright(image: "Image") -> "Image":
    from PIL import ImageOps

    image.load()
    return ImageOps.exif_transpose(image) if 1 < _orientation(image) <= 8 else image


def _opaque(image: "Image", background: int) -> "Image":
    """The image in front of a grey background, if any of its pixels may be transparent."""
    from PIL import Image

    if image.mode not in TRANSPARENT_MODES and "transparency" not in image.info:
        return image
    behind = Image.new("RGBA", image.size, (background, background, background, 255))
    return Image.alpha_composite(behind, image.convert("RGBA"))


def shortened(files: Sequence[str]) -> str:
    """How many files there are, and the first of them."""
    more = ", ..." if len(files) > MOST_FILES else ""
    return f"{len(files)} ({', '.join(files[:MOST_FILES])}{more})"


def refused(errors: Sequence[InputError]) -> InputError:
    """One error for all images that cannot be used."""
    if len(errors) == 1:
        return errors[0]
    listed = "; ".join(f"{error.key} {error.problem}" for error in errors[:MOST_FILES])
    more = f"; and {len(errors) - MOST_FILES} more" if len(errors) > MOST_FILES else ""
    advice = " or ".join(dict.fromkeys(error.allowed for error in errors))
    return InputError(
        f"{len(errors)} images", allowed=f"{listed}{more}: {advice}", problem="cannot be used"
    )


@contextmanager
def _errors_naming(path: str) -> Iterator[None]:
    """Turn any error in the block into an `InputError` that names the file `path`."""
    # Depending on the format, broken files raise OSError, SyntaxError, ValueError, struct.error...
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problem = f"is an unreadable image ({reason})"
        allowed = "replace or delete it, or give dataset.skip_unreadable=true"
        raise InputError(path, allowed=allowed, problem=problem) from error
