"""The largest amount of memory that a part of a run has used."""

import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

MIB = 2**20

# Linux: writing 5 sets the peak in `status` to what is used now.
RESET, STATUS, PEAK = Path("/proc/self/clear_refs"), Path("/proc/self/status"), "VmHWM:"


def peak_meter(device: torch.device) -> Callable[[], float]:
    """Start measuring; the returned function gives the peak since then, in MiB.

    On CUDA this is the memory of tensors on `device`. Elsewhere it is the memory of the process,
    all of its life where the system cannot measure a part of it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device) / MIB
    try:
        RESET.write_text("5")
    except OSError:
        return _of_the_whole_process
    return _since_the_reset


def _since_the_reset() -> float:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(PEAK))
    return float(line.split()[1]) / 1024


def _of_the_whole_process() -> float:
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / MIB
    import resource

    # In KiB, on macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
