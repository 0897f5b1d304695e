"""Data sets as the package `datasets` reads them, from a folder or from the Hugging Face Hub."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from robusttrain.data.labels import Origin
from robusttrain.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

EXTRA = "pip install 'robusttrain[huggingface]'"

# Files that `save_to_disk` of the package writes for all splits, and for one data set.
SAVED = ("dataset_dict.json", "state.json")


class Online(NamedTuple):
    """A data set of the Hub: its name, configuration and version."""

    path: str
    name: str | None
    revision: str | None


def read(folder: Path, kept: Path, origin: Origin) -> Any:
    """The data set, or its splits by their names, in a folder.

    `kept` is where the package prepares files that it cannot read directly.

    Raises
    ------
    InputError
        If the package is missing, or cannot read the folder.
    """
    datasets = package()
    try:
        with _silent(datasets):
            if any((folder / name).is_file() for name in SAVED):
                return datasets.load_from_disk(str(folder))
            return datasets.load_dataset(str(folder), cache_dir=str(kept / "cache"))
    # The package and its readers have no common exception.
    except Exception as error:
        problem = f"cannot be read by the package datasets ({_reason(error)})"
        raise origin.error(
            problem, "a folder of save_to_disk, or of parquet or image files"
        ) from error


def downloaded(online: Online, kept: Path, origin: Origin, *, allowed: bool) -> Path:
    """The folder below `kept` with a data set of the Hub, which is downloaded if it is not there.

    Raises
    ------
    InputError
        If it is not there, and may not or cannot be downloaded.
    """
    place = kept / "--".join(word.replace("/", "-") for word in online if word)
    if place.is_dir():
        return place
    if not allowed:
        problem = f"is no folder, is not in {kept}, and download=false"
        raise origin.error(problem, "give a folder or set download=true")
    datasets = package()
    kept.mkdir(parents=True, exist_ok=True)
    # Processes of a run, and jobs of a sweep, download once.
    with FileLock(f"{place}.lock"):
        if not place.is_dir():
            _download(datasets, online, place, origin)
    return place


def _download(datasets: Any, online: Online, place: Path, origin: Origin) -> None:
    part, cache = Path(f"{place}.part"), str(place.parent / "cache")
    try:
        found = datasets.load_dataset(
            online.path, online.name, revision=online.revision, cache_dir=cache
        )
        found.save_to_disk(str(part))
    # Network, Hub and files raise whatever they like.
    except Exception as error:
        shutil.rmtree(part, ignore_errors=True)
        problem = f"is no folder, and cannot be downloaded ({_reason(error)})"
        raise origin.error(problem, "check the name and the network") from error
    part.rename(place)


def images(
    data: Any, column: str, rows: NDArray[np.int64], origin: Origin
) -> Iterator[tuple[str, "Image"]]:
    """Name and image of each of the rows."""
    chosen = iter(data.select_columns([column]).select(rows))
    for row in rows.tolist():
        try:
            image = next(chosen)[column]
        # Damaged images raise whatever their bytes lead to.
        except Exception as error:
            problem = f"has an unreadable image in row {row} ({_reason(error)})"
            raise origin.error(problem, "replace or delete it") from error
        if image is None:
            raise origin.error(f"has no image in row {row}", "replace or delete it")
        yield f"{origin.value}, row {row},", image


def labels_of(data: Any, column: str) -> tuple[NDArray[Any], list[str] | None]:
    """The labels, integers or text (N,), and the names of the classes if the data has them."""
    values = np.array(data[column][:])
    if values.dtype.kind not in "iuU" or values.ndim != 1:
        problem = f"holds {data.features[column]}"
        allowed = "a column of classes, integers from 0 or text, without gaps"
        raise InputError("dataset.label_column", column, allowed, problem)
    return values, getattr(data.features[column], "names", None)


@contextmanager
def _silent(datasets: Any) -> Iterator[None]:
    """Turn off the progress bars of the package in the block."""
    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()


def package() -> Any:
    try:
        import datasets
    except ImportError as error:
        problem = f"needs a package that is not installed ({error})"
        raise InputError("dataset", "huggingface", EXTRA, problem) from error
    return datasets


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
