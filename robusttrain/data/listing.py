"""The image files of a folder, by class, and what else lies there."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from robusttrain.errors import InputError

# Those of torchvision's ImageFolder, and further formats of pictures. Files of a format that cannot
# be decoded here are thus refused by name.
IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
    ".gif", ".jfif", ".jp2", ".jxl", ".avif", ".heic", ".heif",
)  # fmt: skip
LAYOUT = "<path>/<class>/* or <path>/train/<class>/* with <path>/test/<class>/*"

# Folders that hold a split in common layouts.
SPLITS = ("train", "test", "val", "valid", "validation")


class ClassFiles(NamedTuple):
    """The images of a class: their folder, and their paths in it, in order."""

    folder: Path
    names: list[str]


# The classes by name, in order.
Listing = Mapping[str, ClassFiles]


class Folders(NamedTuple):
    """The classes in the folder of a data set.

    Parameters
    ----------
    train, test
        The classes of each split. `test` is None if it has to be drawn from `train`.
    passed_over
        How many files and folders are not read, by their extension or kind.
    """

    train: Listing
    test: Listing | None
    passed_over: Mapping[str, int]


def listed(path: str) -> Folders:
    """The classes in the folder `path`, as `LAYOUT` describes it.

    Raises
    ------
    InputError
        If there is no such folder, or it has another layout.
    """
    root, passed = Path(path).expanduser(), Counter[str]()
    if not root.is_dir():
        raise InputError("dataset.path", path, f"expected {LAYOUT}", "is not a folder")
    if not all((root / part).is_dir() for part in ("train", "test")):
        classes = _classes(path, root, passed)
        _refuse_splits(path, classes)
        return Folders(classes, None, passed)
    train, test = (_classes(path, root / part, passed) for part in ("train", "test"))
    if train.keys() != test.keys():
        alone = ", ".join(sorted(train.keys() ^ test.keys()))
        problem = f"has different classes in train and test; in one alone: {alone}"
        raise InputError("dataset.path", path, problem=problem)
    beside = [entry for entry in os.scandir(root) if entry.name not in ("train", "test")]
    passed.update(_kind(entry) for entry in beside)
    return Folders(train, test, passed)


def _classes(path: str, folder: Path, passed: Counter[str]) -> dict[str, ClassFiles]:
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    if len(names) < 2:
        problem = f"needs two class folders or more, {folder} has {len(names)}"
        raise InputError("dataset.path", path, f"expected {LAYOUT}", problem)
    passed.update(_kind(entry) for entry in entries if entry.name not in names)
    listing = {name: ClassFiles(folder / name, _images(folder / name, passed)) for name in names}
    for name, images in listing.items():
        if not images.names:
            problem = f"has an empty image folder {folder / name}"
            raise InputError("dataset.path", path, f"expected {LAYOUT}", problem)
    return listing


def _images(folder: Path, passed: Counter[str]) -> list[str]:
    """The paths of all images below `folder`, in the order of torchvision's ImageFolder."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        passed.update("hidden" for name in folders if name.startswith("."))
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(place, folder)
        for name in files:
            if name.startswith("."):
                passed["hidden"] += 1
            elif name.lower().endswith(IMAGE_EXTENSIONS):
                found.append((place, name if inside == "." else f"{inside}/{name}"))
            else:
                passed[_extension(name)] += 1
    return [name for _, name in sorted(found)]


def _refuse_splits(path: str, classes: Listing) -> None:
    """Refuse folders that have the names of splits, and images in folders of their own only."""
    splits = [
        name
        for name, (_, names) in classes.items()
        if name.lower() in SPLITS and all("/" in image for image in names)
    ]
    if splits:
        problem = f"has the folders {', '.join(splits)}, which look like splits and not classes"
        raise InputError("dataset.path", path, f"expected {LAYOUT}", problem)


def _kind(entry: "os.DirEntry[str]") -> str:
    if entry.name.startswith("."):
        return "hidden"
    return f"folder {entry.name}" if entry.is_dir() else _extension(entry.name)


def _extension(name: str) -> str:
    return Path(name).suffix.lower() or "without extension"
