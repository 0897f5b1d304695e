"""Recognise torch's errors when memory runs out, and report them by key."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from robusttrain.errors import InputError

# On a CPU torch raises a plain RuntimeError with this message.
ON_CPU = "DefaultCPUAllocator: can't allocate memory"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether `error` means that a device is out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or ON_CPU in str(error)


@contextmanager
def refused_where_too_large(key: str, images: int) -> Iterator[None]:
    """If memory runs out in the block, report that `key`, the number of `images`, is too large.

    Raises
    ------
    InputError
        In place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        better = f"{key}={images // 2}" if images > 1 else "a device with more memory"
        raise InputError(key, images, f"try {better}", "does not fit into memory") from error
