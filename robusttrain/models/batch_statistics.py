"""Normalise one pass through a network with the batch statistics of another one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class BatchStatistics:
    """The means and the variances of a batch at the BatchNorm layers of a model, with their graph.

    Layers in eval mode keep their running statistics.

    Parameters
    ----------
    model
        The model, in train mode.
    active
        Whether anything is recorded. Otherwise all layers keep their running statistics.
    """

    def __init__(self, model: nn.Module, *, active: bool = True) -> None:
        self.layers = [norm for norm in _norms(model) if active and norm.training]
        self.found: dict[_BatchNorm, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the statistics of a pass through the model in this block."""
        hooks = [layer.register_forward_pre_hook(self._record) for layer in self.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the layers have the recorded statistics as their running ones in this block."""
        own = [(layer, layer.running_mean, layer.running_var) for layer in self.found]
        try:
            for layer, (mean, variance) in self.found.items():
                layer.running_mean, layer.running_var = mean, variance
            yield
        finally:
            for layer, running_mean, running_var in own:
                layer.running_mean, layer.running_var = running_mean, running_var

    def _record(self, layer: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        others = [axis for axis in range(x.dim()) if axis != 1]
        variance, mean = torch.var_mean(x, others, correction=0)
        self.found[layer] = mean, variance


def normalises_batches(model: nn.Module) -> bool:
    """Whether a model has a BatchNorm layer with running statistics."""
    return any(True for _ in _norms(model))


def _norms(model: nn.Module) -> Iterator[_BatchNorm]:
    return (m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None)
