"""The number format inside a network, and the devices on which bf16 pays off."""

from contextlib import AbstractContextManager
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.models.modes import modes_restored
from robusttrain.noise.control import noise_off


class Precision(StrEnum):
    """Number format inside the network; perturbations and updates are always float32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The autocast context for `device`; it does nothing for float32."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.is_bf16(device))

    def is_bf16(self, device: torch.device) -> bool:
        """Whether the network computes in bf16 on `device`."""
        return self is Precision.bf16 or (self is Precision.auto and _computes_in_bf16(device))


def safe(precision: Precision, model: nn.Module, x: Tensor) -> Precision:
    """`precision`, or float32 if torch would compute wrong gradients of `model` in bf16.

    On CPUs, torch reads the bf16 weight gradient of a strided convolution over a single pixel
    partly from uninitialised memory (observed with torch 2.15).

    Parameters
    ----------
    precision
        The configured precision.
    model
        The model, on the CPU.
    x
        Images (N, C, H, W) of the size that it is trained on.

    Raises
    ------
    InputError
        If `precision` is bf16 rather than auto.
    """
    affected: list[bool] = []

    def check(module: nn.Conv2d, arguments: tuple[Tensor, ...]) -> None:
        single = min(arguments[0].shape[-2:]) == 1
        affected.append(single and max(module.stride) > 1 and max(module.kernel_size) > 1)

    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    hooks = [module.register_forward_pre_hook(check) for module in convolutions]
    with modes_restored(model), noise_off(model), torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    if not any(affected):
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
