"""Averages of a model's weights over its training, which take their place in what is kept of it."""

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


class Moment(NamedTuple):
    """When the weights have moved.

    Parameters
    ----------
    progress
        Share of the training that is over, above 0 and up to 1.
    epoch_ends
        Whether the step was the last of an epoch.
    taken
        How often the average has taken weights in.
    """

    progress: float
    epoch_ends: bool
    taken: int


class Averaging(Protocol):
    """Settings of an average.

    BatchNorm keeps the running statistics of the model, unless an average is `Recomputing`.
    """

    def share(self, moment: Moment) -> float:
        """What the weights of `moment` count in the average from there on, from 0 to 1."""


@runtime_checkable
class Recomputing(Protocol):
    """An average that may have BatchNorm's running statistics computed anew for its weights."""

    recompute_statistics: bool


@dataclass
class NoAveraging:
    """The weights as they are."""

    def share(self, moment: Moment) -> float:
        """None at all."""
        return 0.0


@dataclass
class EMA:
    """An exponential moving average of the weights after each batch.

    Its decay is min(decay, (1 + n) / (10 + n)) behind n batches, so that the weights of the
    beginning are soon forgotten. BatchNorm keeps the statistics of the model.

    Parameters
    ----------
    decay
        What the average keeps of itself in a step, from 0 to below 1.
    """

    decay: float = 0.995

    def __post_init__(self) -> None:
        ranges.require(0 <= self.decay < 1, "decay", self.decay, "from 0 to below 1")

    def share(self, moment: Moment) -> float:
        """One minus the decay."""
        return 1 - min(self.decay, (1 + moment.taken) / (10 + moment.taken))


@dataclass
class SWA:
    """The mean of the weights at the ends of epochs (Izmailov et al. 2018, Algorithm 1).

    BatchNorm's running statistics are computed anew for it from the clean training images: one
    forward pass of each of them for validation, and one more where the epoch is kept. It wants a
    rate that stays high, such as `schedule=constant`.

    Parameters
    ----------
    start
        Share of the training, from 0 to below 1, behind which epochs count.
    """

    start: float = 0.75
    recompute_statistics = True

    def __post_init__(self) -> None:
        ranges.require(0 <= self.start < 1, "start", self.start, "from 0 to below 1")

    def share(self, moment: Moment) -> float:
        """That of one epoch among those so far."""
        counts = moment.epoch_ends and moment.progress > self.start
        return 1 / (moment.taken + 1) if counts else 0.0


class Average:
    """The averaged weights of a model.

    Parameters
    ----------
    model
        On its device. The average holds its parameters in their own type.
    settings
        What is averaged.
    """

    def __init__(self, model: nn.Module, settings: Averaging) -> None:
        self.model, self.settings = model, settings
        self.taken = 0
        self.weights: list[Tensor] = []

    @torch.no_grad()
    def update(self, progress: float, *, epoch_ends: bool) -> None:
        """Take in the present weights, as far as the settings have it."""
        share = self.settings.share(Moment(progress, epoch_ends, self.taken))
        if share == 0:
            return
        present = self._present()
        if self.taken == 0:
            self.weights = [weight.clone() for weight in present]
        # (averages, values, how many went before), in place.
        average = get_ema_multi_avg_fn(1 - share)  # type: ignore[no-untyped-call]
        average(self.weights, present, self.taken)
        self.taken += 1

    @contextmanager
    def installed(self, recompute: Callable[[], None]) -> Iterator[None]:
        """Let the model have the averaged weights in this block, if there are any.

        `recompute` computes the running statistics of the model anew. Afterwards its weights and
        buffers are bit for bit what they were.
        """
        if self.taken == 0:
            yield
            return
        present = [*self._present(), *self.model.buffers()]
        own = [value.clone() for value in present]
        _write(self.weights, present[: len(self.weights)])
        try:
            if isinstance(self.settings, Recomputing) and self.settings.recompute_statistics:
                recompute()
            yield
        finally:
            _write(own, present)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, from which the average goes on."""
        return {"taken": self.taken, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, whose tensors may be on another device."""
        places = [weight.device for weight in self._present()]
        self.taken = state["taken"]
        # Copies, since they are averaged in place.
        self.weights = [
            weight.to(place, copy=True)
            for weight, place in zip(state["weights"], places, strict=False)
        ]

    def _present(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self.model.parameters()]


@torch.no_grad()
def recompute_statistics(model: nn.Module, images: Iterable[Tensor]) -> None:
    """Let BatchNorm's running statistics be those of `images`, batches of (N, C, H, W).

    torch's own `update_bn` also clears layers that stay in eval mode when the model is told to
    train, because somebody has frozen them; here they keep what they have.
    """
    with modes_restored(model):
        model.train()
        layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            # The mean over all batches.
            layer.momentum = None
        for x in images if layers else ():
            model(x)
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _write(values: list[Tensor], places: list[Tensor]) -> None:
    """Each of the values to its place in memory."""
    with torch.no_grad():
        for value, place in zip(values, places, strict=True):
            place.copy_(value)
