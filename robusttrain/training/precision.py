"""The number format that a network computes in, and where bf16 is worth having."""

from contextlib import AbstractContextManager
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.models.modes import modes_restored
from robusttrain.noise.control import noise_off


class Precision(StrEnum):
    """Number format inside the network; perturbations and updates are float32 in any case."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context in which a network computes on `device`."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.is_bf16(device))

    def is_bf16(self, device: torch.device) -> bool:
        """Whether that is bf16."""
        return self is Precision.bf16 or (self is Precision.auto and _computes_in_bf16(device))


def safe(precision: Precision, model: nn.Module, x: Tensor) -> Precision:
    """`precision`, or float32 where `auto` would have torch compute gradients from garbage.

    In bf16 on CPUs, the weight gradient of a strided convolution of a single pixel is partly read
    from memory that nobody has written (seen with torch 2.15).

    Raises
    ------
    InputError
        If bf16 was asked for by name.
    """
    seen: list[bool] = []

    def look(module: nn.Conv2d, arguments: tuple[Tensor, ...]) -> None:
        single = min(arguments[0].shape[-2:]) == 1
        seen.append(single and max(module.stride) > 1 and max(module.kernel_size) > 1)

    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    hooks = [module.register_forward_pre_hook(look) for module in convolutions]
    with modes_restored(model), noise_off(model), torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    if not any(seen):
        return precision
    ranges.require(
        precision is not Precision.bf16,
        "training.precision",
        precision,
        "auto or fp32 on a CPU where a strided convolution sees a single pixel",
    )
    return Precision.fp32


def _computes_in_bf16(device: torch.device) -> bool:
    """Whether `device` has instructions for bf16; emulated, it is many times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and any(
        (torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported())
    )
