"""Prepare a model for training: memory layout, precision, several processes and compilation."""

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
    """A model that is prepared for training.

    Parameters
    ----------
    module
        The model itself, whose weights are saved.
    forward
        The module that defenses call: the model, or its compiled or replicated form.
    precision
        Number format inside the model.
    memory_format
        Memory layout of weights and images.
    device
        Device of the model and its images.
    """

    module: nn.Module
    forward: nn.Module
    precision: Precision
    memory_format: torch.memory_format
    device: torch.device

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the inner and outer steps of a defense run."""
        return self.precision.autocast(self.device)


def prepare(model: nn.Module, settings: Training, train: Samples, seed: int) -> ReadyModel:
    """Prepare `model`, on its device, for training on `train`; it is changed in place.

    Raises
    ------
    InputError
        If bf16 is set where torch would read uninitialised memory (see `precision.safe`).
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
    # Without it, Dynamo reuses the code of a model with other hooks, and so loses the noise.
    torch.compiler.reset()
    return cast(nn.Module, torch.compile(model))
