"""How much memory there is for data."""

import math
from pathlib import Path

import torch
from psutil import virtual_memory

# The rest is for the model, its activations, and whatever else is at work.
SHARE = 0.5

GROUPS, GROUP_ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")

# Of the two versions of control groups, by the word for them in `GROUPS`: the files of a limit and
# of what is taken, the field of memory.stat for remembered files, and where the groups are.
FILES = {
    "": (("memory.max", "memory.current", "file"), ""),
    "memory": (("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"), "memory"),
}


def fits(size: int, device: torch.device, share: float = SHARE) -> bool:
    """Whether `size` bytes are a `share` or less of what is free, on `device` and in RAM.

    All data comes through RAM.
    """
    on_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
    return size <= share * min(available(), on_device)


def available() -> float:
    """Bytes of RAM that this process may still take, also where its control group has a limit."""
    return min(float(virtual_memory().available), _of_groups())


def _of_groups() -> float:
    """What the tightest of the control groups around the process leaves."""
    try:
        lines = GROUPS.read_text().splitlines()
    except OSError:
        return math.inf
    own = [line.split(":", 2)[1:] for line in lines]
    return min(
        (_inside(*FILES[kind], path) for kind, path in own if kind in FILES), default=math.inf
    )


def _inside(names: tuple[str, str, str], root: str, path: str) -> float:
    top = GROUP_ROOT / root
    group = top / path.lstrip("/")
    # A container may see the path of its group and not the group: then its root has the limit.
    around = [each for each in (group, *group.parents) if each.is_relative_to(top)]
    return min(_left(each, *names) for each in around)


def _left(group: Path, limit: str, used: str, remembered: str) -> float:
    try:
        most = float((group / limit).read_text().replace("max", "inf"))
        taken = float((group / used).read_text())
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return math.inf
    # Files that the kernel remembers count as taken, and make room when it is asked for.
    return most - taken + float(dict(line.split() for line in lines)[remembered])
