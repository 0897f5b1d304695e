"""Networks, one family a file, each a dataclass whose fields are its configuration.

A network takes images (N, C, H, W) with values in [0, 1] and returns logits (N, num_classes).
Where it wants centred pixels, the shift and scale are its first layer, so that a radius `eps`
always means pixels. Forward passes are free of randomness, but for dropout in train mode, which
draws from torch's global stream.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from robusttrain.errors import InputError
from robusttrain.models.modes import modes_restored

__all__ = ["Architecture", "build_model", "dry_run"]


class Architecture(Protocol):
    """The plan of a network, before classes and image size are known."""

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """A freshly initialised network for images of `image_shape`, which is (C, H, W).

        Initialisation draws from torch's global random stream.
        """


def build_model(
    architecture: Architecture | nn.Module, num_classes: int, image_shape: tuple[int, int, int]
) -> nn.Module:
    """Build the network and try it on two black images, so that a misfit is found before training.

    What is a network already is tried and returned as it is.

    The trial moves no BatchNorm statistics, changes no module's mode and leaves torch's global
    random stream where the initialisation left it.

    Parameters
    ----------
    architecture
        The plan to build, or a network.
    num_classes
        How many logits the network returns.
    image_shape
        (C, H, W).

    Raises
    ------
    InputError
        If the network cannot be built for these images, cannot take them, or returns anything but
        a tensor (N, num_classes).

    Examples
    --------
    >>> from robusttrain.models.mlp import MLP
    >>> model = build_model(MLP(widths=[32]), num_classes=10, image_shape=(1, 8, 8))
    >>> model(torch.rand(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """
    try:
        model = _network(architecture, num_classes, image_shape)
        output = dry_run(model, image_shape)
    except InputError:
        raise
    # torchvision's transformers refuse a size through torch._assert.
    # A forward that wants more than images is refused as a TypeError.
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise _misfit(architecture, image_shape, _reason(error)) from error
    if not isinstance(output, Tensor) or output.shape != (2, num_classes):
        reason = f"for 2 of them it returns {_kind(output)}, not logits of shape (2, {num_classes})"
        raise _misfit(architecture, image_shape, reason)
    return model


def _network(
    architecture: Architecture | nn.Module, num_classes: int, image_shape: tuple[int, int, int]
) -> nn.Module:
    if isinstance(architecture, nn.Module):
        return architecture
    if not hasattr(architecture, "build"):
        allowed = "an nn.Module, or have a method build(num_classes, image_shape)"
        raise InputError(f"model {architecture}", allowed=allowed)
    return architecture.build(num_classes, image_shape)


def dry_run(model: nn.Module, image_shape: tuple[int, int, int]) -> object:
    """What `model` returns for two black images; modes and random streams stay as they are."""
    with modes_restored(model), torch.random.fork_rng(devices=[]), torch.no_grad():
        output: object = model.eval()(torch.zeros(2, *image_shape))
    return output


def _misfit(
    architecture: Architecture | nn.Module, image_shape: tuple[int, int, int], reason: str
) -> InputError:
    # A module prints all of its layers.
    is_module = isinstance(architecture, nn.Module)
    name = type(architecture).__name__ if is_module else str(architecture)
    shape = tuple(image_shape)
    problem = f"cannot take images of shape {shape}"
    return InputError(f"model {name}", allowed=reason, problem=problem)


def _reason(error: Exception) -> str:
    """The line that says what is wrong: TorchScript puts a traceback of its own before it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if "TorchScript" in lines[0] else lines[0]


def _kind(output: object) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    return f"a {type(output).__name__}"
