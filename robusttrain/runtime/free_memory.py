"""The memory that is available for data."""

import math
from pathlib import Path

import torch
from psutil import virtual_memory

# Share of the free memory for data. The rest is for the model, its activations and other programs.
SHARE = 0.5

GROUPS, GROUP_ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")

# For version 2 and version 1 of control groups, by their word in `GROUPS`: the files of limit and
# usage, the field of memory.stat for cached files, and the folder of the groups.
FILES = {
    "": (("memory.max", "memory.current", "file"), ""),
    "memory": (("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"), "memory"),
}


def fits(size: int, device: torch.device, share: float = SHARE) -> bool:
    """Whether `size` bytes are at most a `share` of the free memory, in RAM and on `device`.

    RAM counts for every device, since all data passes through it.
    """
    on_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
    return size <= share * min(available(), on_device)


def available() -> float:
    """Bytes of RAM that this process may still use, within the limits of its control groups."""
    return min(float(virtual_memory().available), _available_in_groups())


def _available_in_groups() -> float:
    """Bytes that the tightest of the process's control groups leaves."""
    try:
        lines = GROUPS.read_text().splitlines()
    except OSError:
        return math.inf
    own = [line.split(":", 2)[1:] for line in lines]
    return min(
        (_available_in(*FILES[kind], path) for kind, path in own if kind in FILES),
        default=math.inf,
    )


def _available_in(names: tuple[str, str, str], root: str, path: str) -> float:
    """The least that the group at `path` and its ancestors leave."""
    top = GROUP_ROOT / root
    group = top / path.lstrip("/")
    # A container may see the path of its group but not the group itself; its root has the limit.
    groups = [each for each in (group, *group.parents) if each.is_relative_to(top)]
    return min(_remaining(each, *names) for each in groups)


def _remaining(group: Path, limit: str, usage: str, cached: str) -> float:
    try:
        most = float((group / limit).read_text().replace("max", "inf"))
        used = float((group / usage).read_text())
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return math.inf
    # Cached files count as used, but the kernel frees them on demand.
    return most - used + float(dict(line.split() for line in lines)[cached])
