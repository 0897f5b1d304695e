"""Write tensors to files atomically."""

import errno
from pathlib import Path
from typing import Any

import torch

from robusttrain.report.files import whole


def write(path: Path, content: Any) -> None:
    """Write tensors, plain values and containers of them to `path` with `torch.save`, atomically.

    Raises
    ------
    OSError
        If the file cannot be written, for example because the disk is full.
    """
    with whole(path) as temporary:
        # torch's writer does not report why a file cannot be created; this does.
        temporary.touch()
        try:
            torch.save(content, temporary)
        except RuntimeError as error:
            # torch reports a full disk as a generic write error.
            reason = "it could not be written completely (is the disk full?)"
            raise OSError(errno.ENOSPC, reason, str(path)) from error
