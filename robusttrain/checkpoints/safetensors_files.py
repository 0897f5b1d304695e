"""Files of safetensors, which hold tensors by name and nothing else."""

from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from robusttrain.errors import InputError

# Bytes of the length of the header in JSON, which follows it.
LENGTH = 8


def is_one(path: Path) -> bool:
    """Whether `path` is a file of safetensors, by its name or by its first bytes."""
    with path.open("rb") as file:
        first = file.read(LENGTH + 1)
    size = int.from_bytes(first[:LENGTH], "little")
    return path.suffix == ".safetensors" or (
        first[LENGTH:] == b"{" and size + LENGTH <= path.stat().st_size
    )


def read(path: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU; `key` is the configuration key that named it.

    Raises
    ------
    InputError
        If the file is damaged, or the package safetensors is not installed.
    """
    if find_spec("safetensors") is None:
        allowed = "pip install 'robusttrain[safetensors]'"
        raise InputError(key, path, allowed, "needs the package safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        problem = "is a damaged file of safetensors"
        raise InputError(key, path, reason, problem) from error
    return tensors
