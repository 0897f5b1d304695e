"""Deterministic algorithms, which give the same bits every time, as an option."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from robusttrain.errors import InputError

# cuBLAS reads this variable when it starts. Without a workspace for each stream, it may add in any
# order.
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACE_SIZES = ":4096:8"

# torch's message about an operation without a deterministic form.
REFUSAL = re.compile(r"(\S+).* does not have a deterministic implementation")


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Let torch use only deterministic algorithms in this block, if `wanted`.

    The settings apply to the whole process, and are restored after the block.

    Raises
    ------
    InputError
        If an operation in the block has no deterministic form.
    """
    if not wanted:
        yield
        return
    cudnn, workspace = torch.backends.cudnn, os.environ.get(WORKSPACE)
    before = cudnn.deterministic, cudnn.benchmark
    algorithms = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn.deterministic, cudnn.benchmark = True, False
    torch.use_deterministic_algorithms(True)
    os.environ.setdefault(WORKSPACE, WORKSPACE_SIZES)
    try:
        yield
    except RuntimeError as error:
        operation = REFUSAL.search(str(error))
        if operation is None:
            raise
        reason = f"{operation[1]} has no deterministic form on this device"
        raise InputError("deterministic", "true", reason, "is not possible") from error
    finally:
        cudnn.deterministic, cudnn.benchmark = before
        torch.use_deterministic_algorithms(algorithms, warn_only=warns)
        if workspace is None:
            del os.environ[WORKSPACE]


def flags() -> dict[str, Any]:
    """The current settings that affect reproducibility, for `manifest.json`."""
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        WORKSPACE: os.environ.get(WORKSPACE),
    }
