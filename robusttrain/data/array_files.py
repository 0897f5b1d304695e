"""Images and labels in the array files of NumPy, `.npz` and `.npy`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from robusttrain.errors import InputError

LAYOUTS = ("NHWC", "NCHW", "NHW")

# Names of images and labels in a `.npz` file: those that a file of one split has, and those with
# which a file may hold both. The first pair that a file has is read.
ALONE = (("x", "y"), ("X", "y"), ("images", "labels"), ("data", "labels"))
TRAIN = (("x_train", "y_train"), ("X_train", "y_train"), ("train_images", "train_labels"))
TEST = (("x_test", "y_test"), ("X_test", "y_test"), ("test_images", "test_labels"))

# Images in a look at values, so that a mapped file never lies in memory as a whole.
AT_ONCE = 1024


class Source(NamedTuple):
    """The file of a split, and the key that names it.

    Parameters
    ----------
    key
        The full key, such as `dataset.train`.
    path
        A `.npz` file with images and labels, or a `.npy` file with images.
    labels
        With `.npy`, the `.npy` file of the labels.
    names
        The names that images and labels may have in a `.npz` file.
    """

    key: str
    path: str
    labels: str | None
    names: Sequence[tuple[str, str]]


class Pair(NamedTuple):
    """Images as they lie in the file, and their labels: integers or text of shape (N,)."""

    images: NDArray[Any]
    labels: NDArray[Any]


def read(source: Source, layout: str) -> Pair:
    """The images of a split as (N, C, H, W), and its labels; images of a `.npy` file are mapped.

    Raises
    ------
    InputError
        If there is no such file, if it is damaged or holds something else, if `auto` cannot tell
        its layout, or if values are no pixels.
    """
    arrays = opened(source.key, source.path)
    if isinstance(arrays, np.ndarray):
        images, labels = arrays, _labels_beside(source)
    else:
        images, labels = _found(source, arrays)
    _refuse_type(source, images)
    pair = Pair(channels_first(source, images, layout), _flat(source, labels))
    if len(pair.images) != len(pair.labels) or not len(pair.labels):
        problem = f"has {len(pair.images)} images and {len(pair.labels)} labels"
        raise InputError(source.key, source.path, "a label for each image, one or more", problem)
    _refuse_values(source, pair.images)
    return pair


def names_in(source: Source) -> list[str]:
    """The names of the arrays in a `.npz` file; none for any other file."""
    if not source.path.endswith(".npz"):
        return []
    arrays = opened(source.key, source.path)
    return [] if isinstance(arrays, np.ndarray) else list(arrays)


def opened(key: str, path: str) -> Any:
    """The array in a `.npy` file, mapped, or the archive in a `.npz` file."""
    file = Path(path).expanduser()
    if file.suffix not in (".npy", ".npz"):
        raise InputError(key, path, "a file .npz or .npy of numpy.savez or numpy.save")
    if not file.is_file():
        raise InputError(key, path, problem="is not a file")
    # Damaged files raise whatever their bytes lead to.
    try:
        return np.load(file, mmap_mode="r" if file.suffix == ".npy" else None, allow_pickle=False)
    except Exception as error:
        raise _unreadable(key, path, error) from error


def _refuse_values(source: Source, images: NDArray[Any]) -> None:
    """Refuse floats that are no pixels in [0, 1], and bytes that were cast from such floats."""
    low, high = np.inf, -np.inf
    for start in range(0, len(images), AT_ONCE):
        part = images[start : start + AT_ONCE]
        # Unlike min and max of Python, these keep NaN.
        low, high = np.minimum(low, part.min()), np.maximum(high, part.max())
    if images.dtype == np.uint8:
        wrong, allowed = high <= 1, "multiply by 255: bytes go from 0 to 255"
    else:
        wrong = not (low >= 0 and high <= 1)
        allowed = "pixels are in [0, 1] as floats, or bytes (uint8) from 0 to 255"
    if wrong:
        problem = f"has images of {images.dtype} with values from {low:.4g} to {high:.4g}"
        raise InputError(source.key, source.path, allowed, problem)


def channels_first(source: Source, images: NDArray[Any], layout: str) -> NDArray[Any]:
    """Images as (N, C, H, W).

    With `auto`, three dimensions are grey images (N, H, W). Of four, the axis of the channels is
    the one that alone has 1 or 3 entries.
    """
    chosen = _layout(images.shape) if layout == "auto" else layout
    problem = f"has images of shape {'x'.join(map(str, images.shape))}"
    if not chosen:
        problem += ", of which the layout cannot be told"
        keys = "set dataset.layout=NHWC (channels last) or NCHW (channels first)"
        raise InputError(source.key, source.path, keys, problem)
    if images.ndim != len(chosen) or 0 in images.shape[1:]:
        expected = f"expected {' or '.join(LAYOUTS) if layout == 'auto' else layout}"
        raise InputError(source.key, source.path, expected, problem)
    if chosen == "NHW":
        return images[:, None]
    return images.transpose(0, 3, 1, 2) if chosen == "NHWC" else images


def _layout(shape: tuple[int, ...]) -> str:
    """The layout of images of a shape; empty where several fit, or none."""
    if len(shape) != 4:
        return "NHW"
    first, last = (shape[axis] in (1, 3) for axis in (1, 3))
    if first == last:
        return ""
    return "NCHW" if first else "NHWC"


def _found(source: Source, arrays: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    names = next((pair for pair in source.names if set(pair) <= set(arrays)), None)
    if names is None:
        expected = ", ".join(dict.fromkeys(f"{x} and {y}" for x, y in source.names))
        problem = f"has no images with labels, but {', '.join(arrays) or 'nothing'}"
        raise InputError(source.key, source.path, f"expected {expected}", problem)
    try:
        images, labels = (arrays[name] for name in names)
    except Exception as error:
        raise _unreadable(source.key, source.path, error) from error
    return images, labels


def _labels_beside(source: Source) -> NDArray[Any]:
    key = f"{source.key}_labels"
    if source.labels is None:
        problem = "holds images alone"
        raise InputError(source.key, source.path, f"give their labels with {key}=FILE", problem)
    labels = opened(key, source.labels)
    if not isinstance(labels, np.ndarray):
        raise InputError(key, source.labels, "a file .npy with the labels of the images")
    return labels


def _refuse_type(source: Source, images: NDArray[Any]) -> None:
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        problem = f"has images of type {images.dtype}"
        allowed = "bytes (uint8) from 0 to 255, or floats in [0, 1]"
        raise InputError(source.key, source.path, allowed, problem)


def _flat(source: Source, labels: NDArray[Any]) -> NDArray[Any]:
    """The labels as a vector; some archives have a column of them."""
    column = labels.ndim == 2 and labels.shape[1] == 1
    if labels.dtype.kind not in "iuU" or not (labels.ndim == 1 or column):
        shape = "x".join(map(str, labels.shape)) or "a single number"
        problem = f"has labels of type {labels.dtype} and shape {shape}"
        raise InputError(source.key, source.path, "integers from 0 or names of classes", problem)
    return np.asarray(labels).reshape(-1)


def _unreadable(key: str, path: str, error: Exception) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    if "allow_pickle" in reason or "Python objects" in reason:
        problem = "holds Python objects (pickles), which can run code and are not read"
        return InputError(key, path, "save plain arrays", problem)
    return InputError(key, path, "save it again", f"is damaged ({reason})")
