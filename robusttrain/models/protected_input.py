"""A model that writes to its input works on a copy of it, so that no caller's images change."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import prod

import torch
from torch import Tensor, nn

from robusttrain.errors import InputError
from robusttrain.models.modes import modes_restored
from robusttrain.noise.control import drawing_from, smoothed


def protect_input(model: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Give `model` a copy of its input in each pass, if it writes to its input in any mode.

    A trial on two images in eval mode and in train mode decides, so that other models copy nothing.
    It leaves buffers, modes and random streams as they were.

    Raises
    ------
    InputError
        If the model writes to its input and is a module of TorchScript, which takes no hooks.
    """
    if not _writes_to_input(model, image_shape):
        return
    if isinstance(model, torch.jit.ScriptModule):
        allowed = "let it work on a copy, x = x.clone()"
        raise InputError("model", type(model).__name__, allowed, "writes to its input images")
    # Before the hook of a noise at the input, which may write to it, too.
    model.register_forward_pre_hook(_copied, prepend=True)


# Annotated as TorchScript requires it, which compiles the hooks of a module with the module.
def _copied(self: nn.Module, input: tuple[Tensor]) -> tuple[Tensor]:
    # Bounds of images are no tensors, and know no operation that writes.
    return (input[0].clone(),) if isinstance(input[0], Tensor) else input


def _writes_to_input(model: nn.Module, image_shape: tuple[int, int, int]) -> bool:
    # All values from black to white, since a model may change some of them only.
    images = torch.linspace(0, 1, 2 * prod(image_shape)).reshape(2, *image_shape)
    with (
        modes_restored(model),
        buffers_restored(model),
        torch.random.fork_rng(devices=[]),
        # With all noise switched on.
        drawing_from(model, 0),
        smoothed(model),
        torch.no_grad(),
    ):
        return any(_changes(model.train(mode), images) for mode in (False, True))


def _changes(model: nn.Module, images: Tensor) -> bool:
    given = images.clone()
    version = given._version
    # Some models are never trained, and cannot run in train mode.
    with suppress(Exception):
        model(given)
    # The version also counts writes that change no value here, and values also show writes by
    # `Tensor.data`, which have no version.
    return given._version != version or not torch.equal(given, images)


@contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    """Write the values of all buffers of `model` back at the end of the block."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
