"""Models and images that a Python program gives, in the form that a run works with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from robusttrain import ranges
from robusttrain.data import Info, Split, as_input
from robusttrain.errors import InputError
from robusttrain.models import described, reason_of
from robusttrain.models.modes import modes_restored

Model = nn.Module | Callable[[Tensor], Tensor]
"""A module, or any function, from images (N, C, H, W) in [0, 1] to logits (N, K)."""

Images = Tensor | Dataset[Any] | DataLoader[Any]
"""Images alone, or pairs of images and labels."""

# Images that are taken from a data set at a time.
BATCH = 256


class GivenModel(nn.Module):
    """A model of the caller's own, which gets no hook and no other change by being evaluated.

    It is given copies of the images, in the number format of its weights.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        formats = (weight.dtype for weight in self.parameters() if weight.is_floating_point())
        self.format = next(formats, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K)."""
        # Some models write to their images.
        return self.model(x.to(self.format, copy=True))

    @property
    def name(self) -> str:
        """The class of a module, or the name of a function."""
        return str(getattr(self.model, "__name__", type(self.model).__name__))


@dataclass
class GivenData:
    """Images of the caller's own as the data set of a run.

    Parameters
    ----------
    train, test
        The images that are trained on, and those that are evaluated.
    num_classes
        The number of classes.
    validation, crop, flip
        As for every data set.
    """

    train: Split
    test: Split
    num_classes: int
    validation: float = 0.0
    crop: int = 0
    flip: bool = False

    def info(self) -> Info:
        """The shape of an image, and the number of classes."""
        channels, height, width = self.test.image_shape
        return Info((channels, height, width), self.num_classes, ())

    def load(self) -> tuple[Split, Split]:
        """The images."""
        return self.train, self.test


def device_of(model: nn.Module, device: torch.device | str | None, images: Tensor) -> torch.device:
    """The device that is given, or else that of the model, or of the images."""
    if device is not None:
        return torch.device(device)
    first = next((tensor for tensor in (*model.parameters(), *model.buffers())), images)
    return first.device


def samples_of(x: Images, y: Tensor | None) -> Split:
    """Images with their labels.

    Parameters
    ----------
    x
        Images (N, C, H, W) as floats in [0, 1], which become float32, or as bytes; or a data set or
        a loader, which is read once, in its order.
    y
        Labels (N,) of images; None with a data set or a loader, which has them.

    Raises
    ------
    InputError
        If there are no images, if they or the labels have another form, or if values lie outside
        [0, 1].
    """
    if isinstance(x, DataLoader | Dataset):
        ranges.require(y is None, "y", "a tensor", "left out, as the data set has the labels")
        x, y = _read(x)
    ranges.require(y is not None, "y", None, "the labels of the images")
    images, labels = torch.as_tensor(x).detach(), torch.as_tensor(y).detach()
    _check_images(images)
    _check_labels(labels, len(images))
    return Split(images if images.dtype == torch.uint8 else images.float(), labels.long())


def name_of(x: Images) -> str:
    """The name of the images in reports."""
    if isinstance(x, DataLoader):
        return type(x.dataset).__name__
    return type(x).__name__ if isinstance(x, Dataset) else "images"


def _read(data: Dataset[Any] | DataLoader[Any]) -> tuple[Tensor, Tensor]:
    loader = data if isinstance(data, DataLoader) else DataLoader(data, batch_size=BATCH)
    try:
        batches = [(x, torch.as_tensor(y)) for x, y, *_ in loader]
        images, labels = zip(*batches, strict=True)
        return torch.cat(images), torch.cat(labels)
    except (TypeError, ValueError) as error:
        allowed = "a data set of pairs (image, label), with images as tensors of one shape"
        raise InputError("x", type(data).__name__, allowed) from error


def _check_images(images: Tensor) -> None:
    shape, is_bytes = tuple(images.shape), images.dtype == torch.uint8
    allowed = "images of shape (N, C, H, W), one or more"
    ranges.require(len(shape) == 4 and all(shape), "x", f"a tensor of shape {shape}", allowed)
    dtype = str(images.dtype).removeprefix("torch.")
    allowed = "floats in [0, 1], or bytes (uint8)"
    ranges.require(is_bytes or images.is_floating_point(), "x", f"a tensor of {dtype}", allowed)
    low, high = float(images.min()), float(images.max())
    # Also false for NaN.
    if not (is_bytes or (low >= 0 and high <= 1)):
        allowed = "pixels are in [0, 1], and normalisation is a part of the model"
        raise InputError("x", allowed=allowed, problem=f"has values from {low:.4g} to {high:.4g}")


def _check_labels(labels: Tensor, count: int) -> None:
    given = f"a tensor of shape {tuple(labels.shape)}"
    ranges.require(labels.shape == (count,), "y", given, f"{count} labels, of shape ({count},)")
    integers = not labels.is_floating_point() and not labels.is_complex()
    dtype = str(labels.dtype).removeprefix("torch.")
    ranges.require(integers, "y", f"a tensor of {dtype}", "a tensor of integers")


def classes_of(model: nn.Module, samples: Split) -> int:
    """How many logits the model returns for the images of `samples`, whose labels fit them.

    Raises
    ------
    InputError
        If it fails, returns anything but logits (N, K), or has no logit for a label.
    """
    x = as_input(samples.images[:2])
    try:
        with modes_restored(model), torch.no_grad():
            output: object = model.eval()(x)
    # A model of the caller's own may raise anything.
    except Exception as error:
        problem = f"fails for images of shape {tuple(samples.image_shape)}"
        raise InputError("model", allowed=reason_of(error), problem=problem) from error
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(x):
        problem = f"returns {described(output)} for {len(x)} images"
        raise InputError("model", allowed="it must return logits of shape (N, K)", problem=problem)
    classes = output.shape[1]
    low, high = int(samples.labels.min()), int(samples.labels.max())
    allowed = f"0 to {classes - 1}, as the model has {classes} logits"
    ranges.require(low >= 0 and high < classes, "y", f"labels from {low} to {high}", allowed)
    return classes
