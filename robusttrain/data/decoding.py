"""Decode image files to bytes of one shape."""

import os
from collections.abc import Iterator
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


class Decoder(NamedTuple):
    """Decodes files to images of one shape.

    Parameters
    ----------
    shape
        (C, H, W); images become grey if C is 1, and RGB if C is 3.
    fit
        Whether to resize the shorter side and keep the centre. Otherwise other sizes are refused.
    """

    shape: tuple[int, int, int]
    fit: bool

    def pixels(self, path: str) -> NDArray[np.uint8]:
        """The image in the file `path`, (C, H, W).

        Raises
        ------
        InputError
            If the file cannot be decoded to such an image; the message names it.
        """
        from PIL import Image, ImageOps

        channels, height, width = self.shape
        with open_image(path) as image:
            self._refuse(image, path)
            image = image.convert("L" if channels == 1 else "RGB")
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
        if not self.fit and image.size != (width, height):
            size = f"{image.width}x{image.height}"
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
        raise InputError(path, allowed="replace or delete it", problem=problem) from error
