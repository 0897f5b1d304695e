"""When memory runs out: how torch says so, and what the user is told."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from robusttrain.errors import InputError

# How torch says it of a CPU, where it has no class of its own for it.
ON_CPU = "DefaultCPUAllocator: can't allocate memory"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether `error` says that a device has no room left."""
    return isinstance(error, torch.OutOfMemoryError) or ON_CPU in str(error)


@contextmanager
def refused_where_too_large(key: str, images: int) -> Iterator[None]:
    """Say that `key`, so many `images` at once, is too large where memory runs out in the block.

    Raises
    ------
    InputError
        Instead of torch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        better = f"{key}={images // 2}" if images > 1 else "a device with more memory"
        raise InputError(key, images, f"try {better}", "does not fit into memory") from error
