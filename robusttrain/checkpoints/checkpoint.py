"""Checkpoints: written atomically, and read as data only."""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robusttrain import renames
from robusttrain.checkpoints import safetensors_files, tensor_files
from robusttrain.checkpoints.kinds import named
from robusttrain.errors import InputError
from robusttrain.report.identity import refuse_mixed
from robusttrain.run_directory import BEST

# The attribute of a record in a ZIP archive that marks it as a folder.
FOLDER = 0x10

# Marks a file as ours. The number rises with every incompatible change of the content.
FORMAT = "robusttrain checkpoint 2"

# The fields that files of earlier formats do not have.
EARLIER = {FORMAT: set(), "robusttrain checkpoint 1": {"class_names"}}


@dataclass(frozen=True)
class Checkpoint:
    """The content of `checkpoint.pt` and `best.pt`.

    Parameters
    ----------
    model
        The state dict of the model.
    num_classes, image_shape
        The number of classes and the image shape (C, H, W) that the model was built for.
    config
        The composed configuration of the run as plain containers, with unresolved interpolations.
    names
        The chosen option of each group.
    epoch
        Number of finished epochs.
    training
        State of the training, from `Trainer.state_dict`; empty if it is not needed.
    class_names
        The name of each class, in the order of the logits; empty if they are unknown.
    """

    model: dict[str, Any]
    num_classes: int
    image_shape: list[int]
    config: dict[str, Any]
    names: dict[str, str]
    epoch: int
    training: dict[str, Any]
    class_names: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write to `path` atomically."""
        tensor_files.write(path, {"format": FORMAT, **vars(self)})

    def load_into(self, model: nn.Module, path: Path | str) -> None:
        """Load the weights into `model`; `path` is only for the message.

        Raises
        ------
        InputError
            If names or shapes of the weights differ from those of `model`.
        """
        own, saved = (_shapes(state) for state in (model.state_dict(), self.model))
        # Before loading, since torch loads whatever fits before it raises.
        different = [name for name in {**own, **saved} if own.get(name) != saved.get(name)]
        if different:
            first = different[0]
            found = f"{first} is {_described(saved, first)}, in the model {_described(own, first)}"
            reason = f"{len(different)} tensors differ: {found}"
            raise InputError("checkpoint", path, reason, "is of another model")
        model.load_state_dict(self.model)


def _shapes(state: Mapping[str, Any]) -> dict[str, list[int]]:
    """The shape of each tensor; of other values, which torch keeps as extra state, an empty one."""
    return {name: list(getattr(value, "shape", ())) for name, value in state.items()}


def _described(shapes: Mapping[str, list[int]], name: str) -> str:
    return str(shapes[name]) if name in shapes else "missing"


def load(path: Path | str, key: str = "checkpoint") -> Checkpoint:
    """Read a checkpoint to the CPU; a run directory stands for its `best.pt`.

    Only tensors and plain containers are unpickled, so no code from the file is run. `key` is the
    configuration key that named the file, for messages.

    Raises
    ------
    InputError
        If the file is missing, damaged, or not a checkpoint of robusttrain.
    """
    path = located(path, key)
    return parse(read(path, key), path, key)


def located(path: Path | str, key: str = "checkpoint") -> Path:
    """The file of `path`: `path` itself, or the `best.pt` of a run directory.

    Raises
    ------
    InputError
        If there is no such file, or the manifest of the run directory is of another one.
    """
    path = Path(path)
    if path.is_dir():
        _refuse_mixed(path, key)
        if not (path / BEST).is_file():
            problem = f"has no {BEST}: nothing was trained there"
            raise InputError(key, path, "name a run that trained", problem)
        path = path / BEST
    if not path.is_file():
        raise InputError(key, path, "name a file or a run directory", "is not there")
    return path


def _refuse_mixed(run_dir: Path, key: str) -> None:
    try:
        refuse_mixed(run_dir, [BEST])
    except InputError as error:
        allowed = f"{error}; to use {BEST} as it is, name the file itself"
        raise InputError(key, run_dir, allowed, "cannot be used") from error


def read(path: Path, key: str = "checkpoint") -> Any:
    """Read tensors, plain values and containers of them from a file of `torch.save`, to the CPU.

    A file of safetensors has tensors alone.

    Raises
    ------
    InputError
        If the file is damaged, or contains anything else, which might run code; or if a package
        that reads it is not installed.
    """
    if safetensors_files.is_one(path):
        return safetensors_files.read(path, key)
    try:
        if _is_archive(path):
            check_sums(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    # A file that is not a pickle makes its reader raise any error: IndexError, struct.error...
    except Exception as error:
        raise InputError(key, path, f"it is {named(path, error)}", "cannot be read") from error


def is_ours(content: object) -> bool:
    """Whether the content of a file is marked as written by any version of robusttrain."""
    return isinstance(content, dict) and str(content.get("format")).startswith("robusttrain ")


def parse(content: Any, path: Path, key: str = "checkpoint") -> Checkpoint:
    """The checkpoint in the content of the file `path`, with current names.

    Raises
    ------
    InputError
        If it is not a checkpoint, or has another format.
    """
    written = content.get("format") if isinstance(content, dict) else None
    expected = {"format", *(member.name for member in fields(Checkpoint))}
    earlier = EARLIER.get(str(written))
    if earlier is None or set(content) != expected - earlier:
        problem = f"is not a checkpoint of robusttrain ({FORMAT!r})"
        raise InputError(key, path, problem=problem)
    own = {key: value for key, value in content.items() if key != "format"}
    return Checkpoint(**own | {"config": renames.config(content["config"])})


def differing(config: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """The keys of `config` whose values are others in `saved`, the configuration of a checkpoint.

    Keys that are missing below the first level, or are empty, came with a later version.
    """
    known = {key: value for key, value in config.items() if value or key in saved}
    return [key for key, value in known.items() if not _agrees(value, saved.get(key))]


def _agrees(value: Any, saved: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(saved, Mapping):
        return bool(value == saved)
    return all(key in value and _agrees(value[key], old) for key, old in saved.items())


def refuse_incomplete(
    saved: Checkpoint, needed: Sequence[str], path: Path | str, key: str = "checkpoint"
) -> None:
    """Raise `InputError` unless the configuration in the file `path` has all keys in `needed`."""
    lacking = [name for name in needed if name not in (saved.config or {})]
    if lacking:
        problem = f"has no configuration of {', '.join(lacking)}"
        raise InputError(key, path, "it cannot be built without", problem)


def _is_archive(path: Path) -> bool:
    """Whether `path` is a zip archive, torch's current format, and not its old one."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def check_sums(path: Path) -> None:
    """Raise `BadZipFile` unless the checksums of all records in an archive are right.

    torch does not check those of tensors, and takes a record that is marked as a folder for empty,
    so that it would return uninitialised memory.
    """
    with zipfile.ZipFile(path) as archive:
        folders = (i.filename for i in archive.infolist() if i.external_attr & FOLDER)
        broken = next(folders, None) or archive.testzip()
    if broken is not None:
        raise zipfile.BadZipFile(f"{broken} is damaged")
