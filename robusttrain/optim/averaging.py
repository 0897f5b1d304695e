"""Averages of a model's weights over training, used for validation and in `best.pt`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from robusttrain import ranges
from robusttrain.models.modes import modes_restored


class TrainingStep(NamedTuple):
    """A step after which the average may be updated.

    Parameters
    ----------
    progress
        Share of the training that is done, above 0 and up to 1.
    ends_epoch
        Whether the step was the last of an epoch.
    updates
        Updates of the average so far.
    """

    progress: float
    ends_epoch: bool
    updates: int


class Averaging(Protocol):
    """Settings of an average.

    BatchNorm keeps the running statistics of the model, unless an average is `Recomputing`.
    """

    def share(self, step: TrainingStep) -> float:
        """Weight of the model's weights after `step` in the new average, from 0 to 1."""


@runtime_checkable
class Recomputing(Protocol):
    """An average that may recompute BatchNorm's running statistics for its weights."""

    recompute_statistics: bool


@dataclass
class NoAveraging:
    """No averaging: the weights of the model are used."""

    def share(self, step: TrainingStep) -> float:
        """Always 0."""
        return 0.0


@dataclass
class EMA:
    """An exponential moving average of the weights, updated after each batch.

    The decay after n batches is min(decay, (1 + n) / (10 + n)), so that early weights are soon
    forgotten. BatchNorm keeps the statistics of the model.

    Parameters
    ----------
    decay
        Share of the old average in the new one, from 0 to below 1.
    """

    decay: float = 0.995

    def __post_init__(self) -> None:
        ranges.require(0 <= self.decay < 1, "decay", self.decay, "from 0 to below 1")

    def refuse_without_effect(self) -> None:
        """Raise `InputError` if the average is that of the last weights alone."""
        ranges.require(self.decay > 0, "decay", self.decay, "above 0; otherwise, averaging=none")

    def share(self, step: TrainingStep) -> float:
        """1 minus the decay."""
        return 1 - min(self.decay, (1 + step.updates) / (10 + step.updates))


@dataclass
class SWA:
    """The mean of the weights at the ends of epochs (Izmailov et al. 2018, Algorithm 1).

    BatchNorm's running statistics are recomputed for the averaged weights from the clean training
    images. That takes a forward pass of all of them for each validation, and another one for each
    epoch that is saved as `best.pt`. SWA needs a learning rate that stays high, such as
    `schedule=constant`.

    Parameters
    ----------
    start
        Share of the training, from 0 to below 1, after which epochs are averaged.
    """

    start: float = 0.75
    recompute_statistics = True

    def __post_init__(self) -> None:
        ranges.require(0 <= self.start < 1, "start", self.start, "from 0 to below 1")

    def share(self, step: TrainingStep) -> float:
        """1 / (number of averaged epochs) at the end of such an epoch, otherwise 0."""
        counts = step.ends_epoch and step.progress > self.start
        return 1 / (step.updates + 1) if counts else 0.0


class Average:
    """The averaged weights of a model.

    Parameters
    ----------
    model
        The model, on its device. The average has the dtypes of its parameters. Those that need no
        gradient now are not averaged, and keep their values.
    settings
        When to average, and with which weights.
    """

    def __init__(self, model: nn.Module, settings: Averaging) -> None:
        self.model, self.settings = model, settings
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.updates = 0
        self.weights: list[Tensor] = []

    @torch.no_grad()
    def update(self, progress: float, *, ends_epoch: bool) -> None:
        """Add the current weights to the average, with the weight that the settings give them."""
        share = self.settings.share(TrainingStep(progress, ends_epoch, self.updates))
        if share == 0:
            return
        current = self._current()
        if self.updates == 0:
            self.weights = [weight.clone() for weight in current]
        # Works in place; the arguments are averages, new values and number of updates.
        average = get_ema_multi_avg_fn(1 - share)  # type: ignore[no-untyped-call]
        average(self.weights, current, self.updates)
        self.updates += 1

    @contextmanager
    def installed(self, recompute: Callable[[], None]) -> Iterator[None]:
        """Give the model the averaged weights in this block, if there are any.

        `recompute` recomputes the running statistics of the model. After the block, its weights and
        buffers are bit for bit what they were.
        """
        if self.updates == 0:
            yield
            return
        current = [*self._current(), *self.model.buffers()]
        own = [value.clone() for value in current]
        _copy(self.weights, current[: len(self.weights)])
        try:
            if isinstance(self.settings, Recomputing) and self.settings.recompute_statistics:
                recompute()
            yield
        finally:
            _copy(own, current)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights, and the number of updates."""
        return {"taken": self.updates, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, whose tensors may be on another device."""
        devices = [weight.device for weight in self._current()]
        self.updates = state["taken"]
        # Copies, since updates work in place.
        self.weights = [
            weight.to(device, copy=True)
            for weight, device in zip(state["weights"], devices, strict=False)
        ]

    def _current(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self.trained]


@torch.no_grad()
def recompute_statistics(model: nn.Module, images: Iterable[Tensor]) -> None:
    """Set BatchNorm's running statistics to those of `images`, batches of shape (N, C, H, W).

    Layers that stay in eval mode after `model.train()`, since they are frozen, keep their
    statistics; torch's own `update_bn` would clear them.
    """
    with modes_restored(model):
        model.train()
        layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            # A cumulative mean over all batches.
            layer.momentum = None
        for x in images if layers else ():
            model(x)
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _copy(sources: list[Tensor], destinations: list[Tensor]) -> None:
    with torch.no_grad():
        for source, destination in zip(sources, destinations, strict=True):
            destination.copy_(source)
