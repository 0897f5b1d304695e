"""Training of one model in several processes: gradients, and the statistics of BatchNorm."""

import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parallel import DistributedDataParallel

from robusttrain.errors import InputError
from robusttrain.models.modes import AlwaysInEval
from robusttrain.noise.layer import noise_layers, untraced
from robusttrain.runtime import distributed


class Replicas(nn.Module):
    """A model whose parameter gradients are averaged over the processes, for use by defenses.

    While the parameters are frozen, as they are for an attack, the passes stay in this process.

    Parameters
    ----------
    model
        The model, or the result of torch.compile.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        with warnings.catch_warnings():
            # The oldest torch that is allowed does not know the new name of this option.
            warnings.simplefilter("ignore", FutureWarning)
            # Each process has its own buffers. A broadcast would overwrite the buffers that the
            # first of two forward passes needs for its backward pass.
            self.synchronised = DistributedDataParallel(model, broadcast_buffers=False)
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K)."""
        frozen = not any(parameter.requires_grad for parameter in self.model.parameters())
        model = self.model if frozen or not torch.is_grad_enabled() else self.synchronised
        return cast(Tensor, model(x))


def replicated(model: nn.Module) -> nn.Module:
    """The model for defenses to call: `model` itself if there is only one process."""
    if distributed.size() == 1:
        return model
    for layer in noise_layers(model):
        # DDP waits for the gradient of each parameter; noise that is off in training has none.
        layer.requires_grad_(layer.on_train)
    return Replicas(model)


def refuse_unused(model: nn.Module) -> None:
    """Refuse a backward pass that gave no gradient for some parameter of `model`.

    With several processes, the others would wait for that gradient.

    Raises
    ------
    InputError
        If there are such parameters; the message names them.
    """
    if not isinstance(model, Replicas):
        return
    named = model.model.named_parameters()
    unused = [name for name, p in named if p.requires_grad and p.grad is None]
    if unused:
        problem = "cannot train a model whose loss leaves out parameters"
        raise InputError("several processes", allowed=", ".join(unused), problem=problem)


def decorrelate_noise(model: nn.Module, seed: int) -> None:
    """Give the noise and dropout of `model` other random streams than in the other processes."""
    if distributed.is_main():
        return
    for layer in noise_layers(model):
        layer.restart(distributed.own_seed(layer.seed))
    torch.manual_seed(distributed.own_seed(seed))


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running statistics of the normalisation layers, by their keys in the state dict.

    Layers that keep their statistics in training are left out.
    """
    return {
        f"{place}.{name}": value
        for place, module in model.named_modules()
        if isinstance(module, _NormBase) and not isinstance(module, AlwaysInEval)
        for name, value in module.named_buffers(recurse=False)
    }


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Replace running statistics by their mean over the processes."""
    running = [value for value in statistics(model).values() if value.is_floating_point()]
    if distributed.size() == 1 or not running:
        return
    flat = torch.cat([value.flatten() for value in running])
    distributed.all_reduce_sum(flat)
    flat /= distributed.size()
    for value, mean in zip(running, torch.split(flat, [v.numel() for v in running]), strict=True):
        value.copy_(mean.view_as(value))


def synchronise_batch_norm(model: nn.Module) -> None:
    """Make BatchNorm layers train on the statistics of all processes' images, in place."""
    for module in _batch_norms(model) if distributed.size() > 1 else ():
        # A new module would lose the hooks, and the optimiser would keep the old parameters.
        module.__class__ = _SynchronisedBatchNorm


def _batch_norms(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, _BatchNorm))


class _Sum(torch.autograd.Function):
    """A sum over all processes. Its backward pass sums the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return cast(Tensor, _Sum.apply(gradients[0]))


class _SynchronisedBatchNorm(_BatchNorm):
    """BatchNorm that normalises the images of all processes with their common statistics.

    Unlike `nn.SyncBatchNorm` it runs on every device, and its gradient can be differentiated again,
    as `defense=rt` does. For an attack it is plain BatchNorm, since attacks of different processes
    differ in length and do not run in step.
    """

    @untraced
    def forward(self, x: Tensor) -> Tensor:
        if not self._in_step or not self.training or not torch.is_grad_enabled():
            return super().forward(x)
        mean, variance, count = _moments(x)
        self._update_running_statistics(mean, variance, count)
        scale = (variance + self.eps).rsqrt()
        scale = scale * self.weight if self.affine else scale
        shift = -mean * scale
        shift = shift + self.bias if self.affine else shift
        shape = [1, -1, *[1] * (x.dim() - 2)]
        return (x * scale.view(shape) + shift.view(shape)).to(x.dtype)

    @property
    def _in_step(self) -> bool:
        """Whether this is a pass of the training step, not of an attack (`frozen`)."""
        if self.running_mean is not None:
            return self.track_running_stats
        return self.affine and self.weight.requires_grad

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics towards those of the batch."""
        if not self.track_running_stats:
            return
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked += 1
        momentum = self.momentum
        rate = 1 / int(self.num_batches_tracked) if momentum is None else momentum
        self.running_mean.lerp_(mean, rate)
        self.running_var.lerp_(variance * count / (count - 1), rate)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any shape: the original layer has checked it in the dry run of the model."""


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance (C,) of each channel over all processes, and the number of values in each.

    The variance is the biased one.
    """
    axes = [axis for axis in range(x.dim()) if axis != 1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, axes, correction=0)
    own = torch.cat([mean, variance, mean.new_tensor([x.numel() / x.shape[1]])])
    # Each process fills only its own row, so that the sum gathers the rows of all.
    rows = [own if r == distributed.rank() else own.new_zeros(len(own)) for r in _ranks()]
    gathered = cast(Tensor, _Sum.apply(torch.stack(rows)))
    means, variances, counts = torch.split(gathered, [len(mean), len(mean), 1], 1)
    count = counts.sum()
    weights = counts / count
    mean = (weights * means).sum(0)
    return mean, (weights * (variances + (means - mean).square())).sum(0), count


def _ranks() -> range:
    return range(distributed.size())
