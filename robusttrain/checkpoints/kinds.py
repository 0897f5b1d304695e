"""What a file is that torch cannot read as tensors, for the message that refuses it."""

import re
import zipfile
from pathlib import Path

# By the first bytes of a file.
SIGNATURES = {
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself with git lfs pull",
    b"<": "a web page: download the file itself",
    b"\x93NUMPY": "an array of NumPy: save a state dict of tensors",
    b"\x89HDF": "a file of HDF5, as Keras writes it: save a state dict of torch",
}
ARRAYS = "an archive of NumPy arrays: save a state dict of tensors"
OTHER = (
    "damaged, or neither a checkpoint of robusttrain nor tensors only (of another model, save only "
    "the state dict)"
)

# As torch's reader names a class of which it does not build an object.
_CLASS = re.compile(r"GLOBAL ([\w.]+)")


def named(path: Path, error: Exception) -> str:
    """What the file `path` is, which torch's reader refused with `error`."""
    with path.open("rb") as file:
        first = file.read(32)
    if not first:
        return "empty"
    known = next((kind for start, kind in SIGNATURES.items() if first.startswith(start)), "")
    if known:
        return known
    if _holds_arrays(path):
        return ARRAYS
    found = _CLASS.search(str(error))
    if found is None:
        return OTHER
    return f"not of tensors alone, since it holds a {found[1]}: save only the state dict"


def _holds_arrays(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError):
        return False
