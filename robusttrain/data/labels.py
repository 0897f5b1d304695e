"""Labels of the user's own, and the draw of a test set by classes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from robusttrain import ranges
from robusttrain.errors import InputError
from robusttrain.seeding import generator_for


class Origin(NamedTuple):
    """Where labels come from: the key that messages name, and its value."""

    key: str
    value: object

    def error(self, problem: str, allowed: str) -> InputError:
        """A refusal that names key and value."""
        return InputError(self.key, self.value, allowed, problem)


def class_names(
    labels: NDArray[Any], given: Sequence[str] | None, num_classes: int | None = None
) -> tuple[str, ...]:
    """The names of the classes of the training labels, integers or text (N,), in their order.

    Raises
    ------
    InputError
        If there is a number of classes, but labels are names.
    """
    if given is not None:
        return tuple(given)
    if labels.dtype.kind == "U":
        allowed = "left out, as the labels are names"
        ranges.require(num_classes is None, "dataset.num_classes", num_classes, allowed)
        return tuple(np.unique(labels).tolist())
    count = num_classes or max(2, int(labels.max()) + 1)
    return tuple(map(str, range(count)))


def numbered(labels: NDArray[Any], names: Sequence[str], origin: Origin) -> NDArray[np.int64]:
    """The labels as positions in `names`.

    Raises
    ------
    InputError
        If a label is none of the classes.
    """
    if labels.dtype.kind == "U":
        unknown = sorted({*labels.tolist()} - {*names})
        if unknown:
            problem = f"has labels that are no class: {', '.join(unknown[:5])}"
            raise origin.error(problem, f"one of {', '.join(names)}")
        places = {name: place for place, name in enumerate(names)}
        return np.array([places[name] for name in labels.tolist()], np.int64)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(names):
        raise origin.error(f"has labels from {low} to {high}", f"from 0 to {len(names) - 1}")
    return labels.astype(np.int64)


def refuse_gaps(labels: NDArray[np.int64], origin: Origin, remedy: str) -> None:
    """Refuse labels that skip a class, such as those that count from 1."""
    counts = np.bincount(labels)
    absent = np.flatnonzero(counts == 0).tolist()
    if absent or len(counts) < 2:
        classes = ", ".join(map(str, absent[:5])) or "1"
        problem = f"has labels up to {len(counts) - 1}, but no image of class {classes}"
        raise origin.error(problem, f"count classes from 0 without gaps{remedy}")


def drawn_test(
    labels: NDArray[np.int64], names: Sequence[str], share: float, seed: int, origin: Origin
) -> NDArray[np.bool_]:
    """Which images become the test set, (N,): a share of each class, at least one image.

    Raises
    ------
    InputError
        If a class has a single image.
    """
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) == 1:
            problem = f"has one image of class {names[label]}"
            raise origin.error(problem, "two are needed to train on one and test on the other")
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        # A stream per class, so that a new class does not change the test images of the others.
        generator = generator_for(seed, f"test split {names[label]}")
        is_test[rows[torch.randperm(len(rows), generator=generator)[:count].numpy()]] = True
    return is_test
