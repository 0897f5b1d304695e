"""The device that a run computes on."""

import torch

from robusttrain import ranges
from robusttrain.errors import InputError
from robusttrain.runtime import distributed


def device_of(name: str) -> torch.device:
    """The device that `name` stands for; with several processes, each gets a GPU of its own.

    Parameters
    ----------
    name
        `auto` (CUDA if available), or a device of torch: cpu, cuda, cuda:1, mps.

    Raises
    ------
    InputError
        If there is no such device, or there are fewer GPUs than processes.
    """
    chosen = name
    if name == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    if distributed.size() > 1:
        chosen = _own_device(chosen)
    try:
        device = torch.device(chosen)
        # torch rejects some names only when memory is allocated, or numbers are drawn.
        torch.empty(0, device=device)
        torch.Generator(device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        allowed = f"auto, cpu, or a device that is present ({_first_line(error)})"
        raise InputError("device", name, allowed) from error
    return device


def _own_device(name: str) -> str:
    many = f"with {distributed.size()} processes"
    ranges.require(name in ("cpu", "cuda"), "device", name, f"auto, cpu or cuda {many}")
    if name == "cpu":
        return name
    here = torch.cuda.device_count()
    allowed = f"cpu, or --nproc_per_node must be at most {here}, the number of GPUs"
    ranges.require(distributed.local_rank() < here, "device", name, allowed)
    return f"cuda:{distributed.local_rank()}"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
