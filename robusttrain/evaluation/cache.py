"""The finished pieces of an evaluation, kept so that a killed one can be resumed."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from robusttrain.checkpoints import tensor_files
from robusttrain.report.files import whole

# Rises when pieces change: those of another version are made again.
FORMAT = 3

# The entry of a file that says which piece it is.
OWNER = "owner"


class Cache(Protocol):
    """A store of finished pieces of work by name."""

    def get(self, key: str) -> Mapping[str, Any] | None:
        """What was put under `key`, or None."""

    def put(self, key: str, result: Mapping[str, Any]) -> None:
        """Keep tensors and numbers under `key`."""

    def remove(self) -> None:
        """Forget all pieces."""


class _Nothing:
    def get(self, key: str) -> None:
        return None

    def put(self, key: str, result: Mapping[str, Any]) -> None:
        pass

    def remove(self) -> None:
        pass


NO_CACHE: Cache = _Nothing()


class FolderCache:
    """Pieces as files of a folder, which belong to one piece of work as a whole.

    Parameters
    ----------
    path
        The folder; made when the first piece is put.
    work
        Says what the work is. Pieces of other work that lie there are not used, and removed.
    """

    def __init__(self, path: Path, work: str) -> None:
        self.path, self.work = path, work
        self._mark = path / "work.txt"
        if self._mark.is_file() and self._mark.read_text() == work:
            return
        self.remove()

    def get(self, key: str) -> Mapping[str, Any] | None:
        """What was put under `key`; None if its file is missing, damaged or exchanged."""
        path = self._file(key)
        if not path.is_file():
            return None
        try:
            content: dict[str, Any] = torch.load(path, weights_only=True)
        # Whatever is wrong with the file, the piece can be made again.
        except Exception:
            return None
        is_own = isinstance(content, dict) and content.pop(OWNER, None) == self._owner(key)
        return content if is_own else None

    def put(self, key: str, result: Mapping[str, Any]) -> None:
        """Keep `result`; written whole or not at all."""
        # A run directory that was removed meanwhile does not come back incomplete.
        self.path.mkdir(exist_ok=True)
        with whole(self._mark) as temporary:
            temporary.write_text(self.work)
        tensor_files.write(self._file(key), {OWNER: self._owner(key), **result})

    def remove(self) -> None:
        """Forget all pieces."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _owner(self, key: str) -> str:
        """Which piece of which work a file holds, since files can be exchanged."""
        return f"{self.work} {key}"

    def _file(self, key: str) -> Path:
        return self.path / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.pt"


def description(model: nn.Module, x: Tensor, y: Tensor, settings: object) -> str:
    """Names a piece of work: the same for the same weights, images, labels and settings only."""
    digest = hashlib.sha256(repr((FORMAT, settings)).encode())
    for tensor in (*model.state_dict().values(), x, y):
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
