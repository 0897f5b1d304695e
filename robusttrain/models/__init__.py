"""Networks, one family per file, each a dataclass whose fields are its configuration.

A network takes images (N, C, H, W) with values in [0, 1] and returns logits (N, num_classes). If it
needs normalised pixels, its first layer normalises them, so that a radius `eps` is always in pixel
units. Forward passes are deterministic, except for dropout in train mode, which draws from torch's
global stream.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from robusttrain.errors import InputError
from robusttrain.models.modes import modes_restored
from robusttrain.models.outputs import take_logits
from robusttrain.models.protected_input import protect_input

__all__ = [
    "Architecture",
    "Pretrained",
    "Resizing",
    "build_model",
    "described",
    "dry_run",
    "reason_of",
]


class Architecture(Protocol):
    """Settings of a network, independent of the number of classes and the image size."""

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """A newly initialised network for images of `image_shape`, which is (C, H, W).

        Initialisation draws from torch's global random stream.
        """


@runtime_checkable
class Pretrained(Protocol):
    """An architecture whose library offers weights for it, as `model.weights=default`."""

    def pretrained(self, image_shape: tuple[int, int, int]) -> Mapping[str, Tensor]:
        """These weights, by the names of the network that `build` returns, with its normalisation.

        Their head has the classes that they were trained on. The library downloads them.

        Raises
        ------
        InputError
            If there are none, or they cannot be downloaded.
        """


@runtime_checkable
class Resizing(Protocol):
    """An architecture that resizes images inside, by its key `image_size`."""

    def usual_size(self) -> int:
        """The side, in pixels, of the images that it is mostly trained with."""


def build_model(
    architecture: Architecture | nn.Module, num_classes: int, image_shape: tuple[int, int, int]
) -> nn.Module:
    """Build a network and run it on two black images, to find a misfit before training.

    A network that is built already is checked and returned.

    The dry run does not change BatchNorm statistics, modes or torch's global random stream. A
    network that writes to its input works on a copy of it from now on, and one that returns more
    than its logits returns them alone (`outputs.logits_in`).

    Parameters
    ----------
    architecture
        The settings of the network, or a network.
    num_classes
        Number of logits that the network has to return.
    image_shape
        Shape (C, H, W) of an image.

    Raises
    ------
    InputError
        If the network cannot be built for such images, fails on them, or returns no logits
        (N, num_classes).

    Examples
    --------
    >>> from robusttrain.models.mlp import MLP
    >>> model = build_model(MLP(widths=[32]), num_classes=10, image_shape=(1, 8, 8))
    >>> model(torch.rand(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """
    try:
        model = network_of(architecture, num_classes, image_shape)
        take_logits(model, image_shape)
        output = dry_run(model, image_shape)
    except InputError:
        raise
    # torchvision's transformers refuse a size by torch._assert, which raises an AssertionError.
    # A forward method with more arguments than images raises a TypeError.
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise _misfit(architecture, image_shape, reason_of(error)) from error
    if not isinstance(output, Tensor) or output.shape != (2, num_classes):
        reason = (
            f"for 2 of them it returns {described(output)}, not logits of shape (2, {num_classes})"
        )
        raise _misfit(architecture, image_shape, reason)
    protect_input(model, image_shape)
    return model


def network_of(
    architecture: Architecture | nn.Module, num_classes: int, image_shape: tuple[int, int, int]
) -> nn.Module:
    """The network that `architecture` builds, or is; raises `InputError` if it is neither."""
    if isinstance(architecture, nn.Module):
        return architecture
    if not hasattr(architecture, "build"):
        allowed = "an nn.Module, or have a method build(num_classes, image_shape)"
        raise InputError(f"model {architecture}", allowed=allowed)
    built: object = architecture.build(num_classes, image_shape)
    if not isinstance(built, nn.Module):
        problem = f"builds a value of type {type(built).__name__}"
        raise InputError(f"model {architecture}", allowed="it must be a module", problem=problem)
    return built


def dry_run(model: nn.Module, image_shape: tuple[int, int, int]) -> object:
    """The output of `model` in eval mode for two black images; modes and random streams stay."""
    with modes_restored(model), torch.random.fork_rng(devices=[]), torch.no_grad():
        output: object = model.eval()(torch.zeros(2, *image_shape))
    return output


def _misfit(
    architecture: Architecture | nn.Module, image_shape: tuple[int, int, int], reason: str
) -> InputError:
    # The text of a module lists all of its layers.
    is_module = isinstance(architecture, nn.Module)
    name = type(architecture).__name__ if is_module else str(architecture)
    shape = tuple(image_shape)
    problem = f"cannot take images of shape {shape}"
    if isinstance(architecture, Resizing):
        reason += f" (model.image_size={architecture.usual_size()} resizes them inside the network)"
    return InputError(f"model {name}", allowed=reason, problem=problem)


def reason_of(error: Exception) -> str:
    """The line of a message that has the cause; TorchScript puts a traceback before it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if "TorchScript" in lines[0] else lines[0]


def described(output: object) -> str:
    """What a network returned, as text for a message."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    return f"a {type(output).__name__}"
