"""Checkpoints: written whole, read as data only, and turned back into models."""

import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robusttrain import renames
from robusttrain.checkpoints import tensor_files
from robusttrain.errors import InputError
from robusttrain.run_directory import BEST

# Says that a file is ours; the number rises when what is in it changes its meaning.
FORMAT = "robusttrain checkpoint 1"


@dataclass(frozen=True)
class Checkpoint:
    """What `checkpoint.pt` and `best.pt` hold.

    Parameters
    ----------
    model
        The state dict.
    num_classes, image_shape
        What the model was built for.
    config
        The composed configuration of the run as plain containers, with its interpolations.
    names
        The chosen option of each group.
    epoch
        Epochs trained.
    training
        States of optimiser, schedule and random streams.
    """

    model: dict[str, Any]
    num_classes: int
    image_shape: list[int]
    config: dict[str, Any]
    names: dict[str, str]
    epoch: int
    training: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write to `path`, whole or not at all."""
        tensor_files.write(path, {"format": FORMAT, **vars(self)})

    def load_into(self, model: nn.Module, path: Path | str) -> None:
        """Load the weights into `model`; `path` is for the message.

        Raises
        ------
        InputError
            If the model's parameters are not the checkpoint's.
        """
        try:
            model.load_state_dict(self.model)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError("checkpoint", path, reason, "is of another model") from error


def load(path: Path | str, key: str = "checkpoint") -> Checkpoint:
    """Read a checkpoint onto the CPU; a run directory stands for its `best.pt`.

    Only tensors and plain containers are unpickled, so reading runs no code of the file's. `key` is
    what the user has named it by, for messages.

    Raises
    ------
    InputError
        If the file is missing, damaged, or no checkpoint of robusttrain.
    """
    path = located(path, key)
    return parse(read(path, key), path, key)


def located(path: Path | str, key: str = "checkpoint") -> Path:
    """The file that `path` stands for: itself, or the `best.pt` of a run directory.

    Raises
    ------
    InputError
        If there is none.
    """
    path = Path(path)
    if path.is_dir():
        path = path / BEST
    if not path.is_file():
        raise InputError(key, path, "name a file or a run directory", "is not there")
    return path


def read(path: Path, key: str = "checkpoint") -> Any:
    """What `torch.save` wrote to `path`, on the CPU: tensors, plain values and containers of them.

    Raises
    ------
    InputError
        If the file is damaged or holds anything else, which might run code.
    """
    try:
        if _is_archive(path):
            check_sums(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    # Bytes that are no pickle can fail anywhere in its reader: IndexError, struct.error, TypeError.
    except Exception as error:
        reason = (
            "it is damaged, or neither of robusttrain nor tensors alone (of another file save the "
            "state dict by itself)"
        )
        raise InputError(key, path, reason, "cannot be read") from error


def is_ours(content: object) -> bool:
    """Whether what a file holds says that robusttrain wrote it, in this version or another."""
    return isinstance(content, dict) and str(content.get("format")).startswith("robusttrain ")


def parse(content: Any, path: Path, key: str = "checkpoint") -> Checkpoint:
    """The checkpoint in the content of the file `path`.

    Raises
    ------
    InputError
        If it is no checkpoint, or one of another format.
    """
    expected = {"format", *(member.name for member in fields(Checkpoint))}
    if not isinstance(content, dict) or set(content) != expected or content["format"] != FORMAT:
        problem = f"is not a checkpoint of robusttrain ({FORMAT!r})"
        raise InputError(key, path, problem=problem)
    own = {key: value for key, value in content.items() if key != "format"}
    return Checkpoint(**own | {"config": renames.config(content["config"])})


def _is_archive(path: Path) -> bool:
    """Whether torch reads `path` as the archive that it writes today, not as its old format."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def check_sums(path: Path) -> None:
    """Raise `BadZipFile` unless every record of an archive has its check sum.

    torch does not look at those of tensors.
    """
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise zipfile.BadZipFile(f"{broken} is damaged")
