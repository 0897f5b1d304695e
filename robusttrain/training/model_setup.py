"""A model made ready for training: its layout in memory, precision, processes and compilation."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from robusttrain.data import Samples, as_input
from robusttrain.training import ddp
from robusttrain.training.precision import Precision, safe
from robusttrain.training.settings import Training


@dataclass(frozen=True)
class ReadyModel:
    """A model and how training computes with it.

    Parameters
    ----------
    module
        The model itself, of which the weights are saved.
    forward
        What defenses call: compiled, or replicated over several processes, where that is wanted.
    precision
        Number format inside of it.
    memory_format
        Of its weights and images.
    device
        Where it and its images are.
    """

    module: nn.Module
    forward: nn.Module
    precision: Precision
    memory_format: torch.memory_format
    device: torch.device

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which a defense computes."""
        return self.precision.autocast(self.device)


def prepare(model: nn.Module, settings: Training, train: Samples, seed: int) -> ReadyModel:
    """Make `model`, on its device, ready for training on `train`; it is changed in place.

    Raises
    ------
    InputError
        If bf16 is asked for where torch would compute gradients from garbage.
    """
    memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
    model.to(memory_format=memory_format)
    precision = _safe_precision(model, settings, train)
    if settings.sync_batchnorm:
        ddp.synchronise_batch_norm(model)
    ddp.decorrelate_noise(model, seed)
    forward = ddp.replicated(_compiled(model) if settings.compile else model)
    return ReadyModel(model, forward, precision, memory_format, train.device)


def _safe_precision(model: nn.Module, settings: Training, train: Samples) -> Precision:
    if train.device.type != "cpu" or not settings.precision.is_bf16(train.device):
        return settings.precision
    first = train.take(torch.tensor([0])).loaded()
    return safe(settings.precision, model, as_input(first.images))


def _compiled(model: nn.Module) -> nn.Module:
    # Dynamo takes a model with other hooks for one that it has compiled before, and drops noise.
    torch.compiler.reset()
    return cast(nn.Module, torch.compile(model))
