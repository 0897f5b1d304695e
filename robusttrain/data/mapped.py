"""Images in an array file, of which only those of the present batch are in memory."""

import hashlib
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robusttrain.data.split import Split
from robusttrain.runtime import free_memory
from robusttrain.runtime.progress import Advance, unreported

# Images that are read at a time where all are.
AT_ONCE = 1024


class Mapped(NamedTuple):
    """Images in a mapped array, and their labels in memory.

    Parameters
    ----------
    images
        All images of the file, (N, C, H, W), bytes or floats in [0, 1].
    rows
        Indices of these samples in `images`, (M,).
    labels
        The class of each sample, int64 of shape (M,), on the CPU.
    stream
        Whether the images stay in their file for use. None decides by the free memory.
    device
        The device of the batches.
    """

    images: NDArray[Any]
    rows: NDArray[np.int64]
    labels: Tensor
    stream: bool | None = None
    device: torch.device = torch.device("cpu")

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height and width."""
        return self.images.shape[1:]

    @property
    def size(self) -> int:
        """The number of images."""
        return len(self.rows)

    @property
    def decoded_bytes(self) -> int:
        """The bytes that all images take in memory."""
        each = 1 if self.images.dtype == np.uint8 else 4
        return self.size * prod(self.image_shape) * each

    def to(self, device: torch.device | str, advance: Advance = unreported) -> "Split | Mapped":
        """The same samples for use on `device`, as a `Split` there unless they stay in the file."""
        moved = self._replace(device=torch.device(device))
        stream = self.stream
        if stream is None:
            stream = not free_memory.fits(self.decoded_bytes, moved.device)
        return moved if stream else moved.loaded(advance)

    def take(self, indices: Tensor) -> "Mapped":
        """The samples at `indices`, int64 of shape (M,) on any device, in that order."""
        here = indices.cpu()
        return self._replace(rows=self.rows[here.numpy()], labels=self.labels[here])

    def loaded(self, advance: Advance = unreported) -> Split:
        """All samples, on `device`."""
        advance(self.size)
        return Split(self._read(self.rows).to(self.device), self.labels.to(self.device))

    def fetch(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels at each of `parts`, on `device`."""
        for part in parts:
            here = part.cpu()
            images = self._read(self.rows[here.numpy()])
            yield images.to(self.device), self.labels[here].to(self.device)

    def digest(self, advance: Advance = unreported) -> str:
        """That of the same samples as a `Split`."""
        sha = hashlib.sha256()
        for start in range(0, self.size, AT_ONCE):
            rows = self.rows[start : start + AT_ONCE]
            sha.update(self._read(rows).numpy().data)
            advance(len(rows))
        sha.update(self.labels.numpy().data)
        return sha.hexdigest()

    def _read(self, rows: NDArray[np.int64]) -> Tensor:
        """Images as bytes or float32, contiguous, on the CPU."""
        images = self.images[rows]
        kind = np.uint8 if images.dtype == np.uint8 else np.float32
        return torch.from_numpy(np.ascontiguousarray(images, kind))
