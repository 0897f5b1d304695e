"""Reference models that come with the package, as `checkpoint=pretrained:NAME`.

`robusttrain/pretrained/` has for each its weights, `NAME.pt`, and its card, `NAME.json`.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from robusttrain.errors import InputError

FOLDER = Path(__file__).parents[1] / "pretrained"

PREFIX = "pretrained:"


def names() -> list[str]:
    """The names of all reference models."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def card(name: str) -> dict[str, Any]:
    """The card of a model: its data, recipe, figures, license and digest."""
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return content


def is_named(path: Path | str) -> bool:
    """Whether `path` names a reference model instead of a file."""
    return str(path).startswith(PREFIX)


def located(path: Path | str, key: str = "checkpoint") -> Path:
    """The file of the reference model that `path` names.

    Raises
    ------
    InputError
        If there is no such model, or its file is not the one that its card describes.
    """
    name = str(path).removeprefix(PREFIX)
    if name not in names():
        known = ", ".join(f"{PREFIX}{known}" for known in names())
        raise InputError(key, path, f"one of {known}")
    file = FOLDER / f"{name}.pt"
    if not file.is_file() or digest(file) != card(name)["sha256"]:
        problem = "is not the model of its card"
        raise InputError(key, path, f"{file} is missing or damaged: install again", problem)
    return file


def digest(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
