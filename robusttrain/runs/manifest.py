"""The manifest of a run, which makes it repeatable: command, data, versions, machine, source."""

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from robusttrain._version import __version__
from robusttrain.runs.context import Origin
from robusttrain.runs.cost import Costs
from robusttrain.runs.inputs import Data
from robusttrain.runtime import distributed

PACKAGES = ("torchvision", "hydra-core", "numpy", "scipy", "pandas")


def manifest(
    origin: Origin,
    device: torch.device,
    data: Data,
    costs: Costs,
    training: Mapping[str, Any] | None,
    determinism: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of `manifest.json`, but for `weights` and `files`.

    Parameters
    ----------
    origin
        The configuration, the arguments that set it, and the command line.
    device
        The device that the run used.
    data
        The data, with a digest of each split: of its pixels and labels or, if it begins with
        `files:`, of its labels and of the size and first bytes of its files.
    costs
        The cost of each stage.
    training
        The number of epochs, and what went wrong in them; None if nothing was trained.
    determinism
        The settings of torch, as returned by `robusttrain.runtime.determinism.flags`.
    """
    return {
        "command": list(origin.command),
        "overrides": list(origin.overrides),
        "configuration": origin.resolved(),
        "seconds": costs.seconds,
        "cost": costs.stages,
        "training": training,
        "trained": origin.trained,
        "data": data.digests,
        "dataset": data.contents,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "determinism": determinism,
        "threads": torch.get_num_threads(),
        "processes": distributed.size(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {
            "robusttrain": __version__,
            "torch": torch.__version__,
            **{name: version(name) for name in PACKAGES},
        },
        "git": _git(Path(__file__).parent),
    }


def _git(folder: Path) -> dict[str, Any] | None:
    """The commit of the source and the differences from it, or None outside a checkout."""
    try:
        return {
            "commit": _run_git(folder, "rev-parse", "HEAD"),
            "dirty": bool(_run_git(folder, "status", "--porcelain")),
            "diff": _run_git(folder, "diff", "HEAD"),
        }
    except (OSError, subprocess.CalledProcessError):
        return None


def _run_git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
