"""Where the logits are in what a network returns, if that is more than a tensor."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from robusttrain.models.modes import modes_restored
from robusttrain.models.protected_input import buffers_restored


def logits_in(output: object) -> object:
    """The logits in the `output` of a network; anything without logits is returned as it is.

    In an object with an attribute `logits`, or in a dictionary with that key, they are that. In a
    tuple or a list they are the first tensor.

    Examples
    --------
    >>> logits_in((None, torch.zeros(2, 3), torch.zeros(2, 5))).shape
    torch.Size([2, 3])
    >>> logits_in({"logits": torch.zeros(2, 3), "loss": torch.zeros(())}).shape
    torch.Size([2, 3])
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        found: object = output.get("logits")
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, tuple | list):
        found = next((part for part in output if isinstance(part, Tensor)), None)
    else:
        return output
    return found if isinstance(found, Tensor) else output


def take_logits(model: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Let `model` return its logits alone, if it returns more than a tensor in any mode.

    A trial on two images in eval mode and in train mode decides, since auxiliary heads are there in
    train mode only. It leaves buffers, modes and random streams as they were. The names of the
    parameters stay, too, because the logits are picked by a hook.
    """
    if not isinstance(model, torch.jit.ScriptModule) and _returns_more(model, image_shape):
        model.register_forward_hook(_picked)


def _picked(module: nn.Module, arguments: tuple[Any, ...], output: object) -> object:
    return logits_in(output)


def _returns_more(model: nn.Module, image_shape: tuple[int, int, int]) -> bool:
    images = torch.zeros(2, *image_shape)
    outputs: list[object] = []
    with (
        modes_restored(model),
        buffers_restored(model),
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
    ):
        for mode in (False, True):
            # Some models are never trained, and cannot run in train mode.
            with suppress(Exception):
                outputs.append(model.train(mode)(images.clone()))
    return any(logits_in(output) is not output for output in outputs)
