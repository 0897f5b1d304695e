"""Which elements a pooling window covers, along one dimension of an image."""

import torch
from torch import Tensor


def windows(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """Indices (kernel, out) of the elements in each of `out` windows over `size` elements.

    What lies in the padding is replaced by the first element of the window, which no maximum sees.
    """
    rows = [
        [i for i in (start + dilation * tap for tap in range(kernel)) if 0 <= i < size]
        for start in range(-padding, out * stride - padding, stride)
    ]
    return _filled(rows)


def adaptive_windows(size: int, out: int) -> Tensor:
    """As `windows`, of adaptive pooling from `size` to `out` elements."""
    return _filled([list(range(i * size // out, -(-(i + 1) * size // out))) for i in range(out)])


def _filled(rows: list[list[int]]) -> Tensor:
    most = max(map(len, rows))
    return torch.tensor([row + row[:1] * (most - len(row)) for row in rows]).T
