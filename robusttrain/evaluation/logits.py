"""A model without the softmax at its end, as attacks need it.

Where a softmax saturates, its gradient is zero, and no search on cross-entropy or margins moves.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robusttrain.evaluation import model_checks

SOFTMAX = {
    torch.softmax,
    torch.special.softmax,
    torch.Tensor.softmax,
    nn.functional.softmax,
}


class WithoutSoftmax(nn.Module):
    """The logits behind the probabilities that `model` returns.

    They are what went into its last softmax, or log p (up to a constant, the same) where the model
    computes its probabilities in another way, as compiled and exported programs do.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # A new module starts in train mode; this one only looks at a model that predicts.
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K)."""
        with _Softmaxes() as softmaxes:
            probabilities: Tensor = self.model(x)
        logits: Tensor = softmaxes.logits(probabilities)
        return logits


def without_softmax(model: nn.Module, x: Tensor) -> nn.Module:
    """`model` itself, or what is in front of its softmax if it returns probabilities for `x`."""
    return WithoutSoftmax(model) if model_checks.softmax_outputs(model, x).message else model


class _Softmaxes(TorchFunctionMode):
    """What went into the softmaxes that are computed within the block."""

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[Tensor, Tensor] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in SOFTMAX and args:
            self._last = result, args[0]
        return result

    def logits(self, probabilities: Tensor) -> Tensor:
        """The logits of `probabilities`, (N, K)."""
        if self._last is not None and self._last[0] is probabilities:
            return self._last[1]
        return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
