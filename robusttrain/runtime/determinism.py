"""Algorithms that give the same bits every time, where a user asks for them."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from robusttrain.errors import InputError

# Read by cuBLAS when it starts: a workspace for each stream, without which it may add in any order.
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACE_SIZES = ":4096:8"

# What torch says of an operation that has no deterministic form.
REFUSAL = re.compile(r"(\S+).* does not have a deterministic implementation")


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Have torch use deterministic algorithms alone in this block, if `wanted`.

    It concerns the whole process, and is put back afterwards.

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
    """What decides at present whether the same command gives the same bits, for `manifest.json`."""
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        WORKSPACE: os.environ.get(WORKSPACE),
    }
