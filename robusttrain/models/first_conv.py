"""The first convolution of a network, with a faster gradient of its images on a CPU."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.jit import is_scripting  # type: ignore[attr-defined]
from torch.nn.grad import conv2d_weight


class FirstConv2d(nn.Conv2d):
    """`nn.Conv2d` with zero padding, but without groups and dilation.

    Attacks need the gradient with respect to images, which training alone does not. On a CPU
    torch's kernel for that gradient, with one or three input channels, takes two to six times as
    long as a matrix product followed by a sum over overlapping windows.
    """

    def forward(self, x: Tensor) -> Tensor:
        # TorchScript, which compiles neither `super` nor autograd functions, stops reading here.
        if is_scripting():
            plain: Tensor = self._conv_forward(x, self.weight, self.bias)
            return plain
        if x.device.type != "cpu" or not x.requires_grad:
            return super().forward(x)
        result: Tensor = _Convolution.apply(x, self.weight, self.bias, self.stride, self.padding)
        return result


class _Convolution(torch.autograd.Function):
    """conv2d whose backward pass is differentiable, so that second derivatives work."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding  # type: ignore[attr-defined]
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        settings: dict[str, Any] = {"stride": ctx.stride, "padding": ctx.padding}
        wanted = ctx.needs_input_grad
        to_x = to_weight = to_bias = None
        if wanted[0]:
            # Autocast is off in the backward pass, so compute in the gradient's dtype.
            windows = weight.flatten(1).T.to(gradient.dtype) @ gradient.flatten(2)
            to_x = F.fold(windows, x.shape[-2:], weight.shape[-2:], **settings).to(x.dtype)
        if wanted[1]:
            to_weight = conv2d_weight(  # type: ignore[no-untyped-call]
                x.to(gradient.dtype), weight.shape, gradient, **settings
            ).to(weight.dtype)
        if wanted[2]:
            to_bias = gradient.sum((0, 2, 3))
        return to_x, to_weight, to_bias, None, None
