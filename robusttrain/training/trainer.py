"""The training loop: epochs of batches, with a validation after each epoch."""

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from robusttrain import renames
from robusttrain.attacks import several_threats
from robusttrain.data import Samples, batches
from robusttrain.defenses import Defense, Stateful
from robusttrain.errors import InputError, NonFiniteLossError
from robusttrain.models.passes import Passes
from robusttrain.optim.averaging import recompute_statistics
from robusttrain.report.terminal import Bar, Terminal
from robusttrain.runtime import distributed
from robusttrain.seeding import generator_for
from robusttrain.threat import Threat
from robusttrain.training import ddp
from robusttrain.training.engine import Batch, Engine
from robusttrain.training.metrics import Epoch, EpochMetrics
from robusttrain.training.model_setup import prepare
from robusttrain.training.optimizer_step import is_finite
from robusttrain.training.overfitting import (
    MAX_ROLLBACKS,
    OverfittedError,
    TrainingHistory,
    probe,
    probe_images,
    trains_on_ball,
)
from robusttrain.training.recipe import Recipe, TrainingData
from robusttrain.training.settings import OnNonFinite
from robusttrain.training.validation import Validator

# Each check of the losses waits for the device; a late check wastes the batches after a NaN.
BATCHES_BETWEEN_CHECKS = 50

# Keys of a training's state whose values differ between its processes. Checkpoints of earlier
# versions have the same keys.
PER_PROCESS = ("random_states", "tally", "defense", "start", "passes")


@dataclass
class _Position:
    """The position of a training between two batches.

    Parameters
    ----------
    epoch
        The present epoch, from 1 on.
    batch
        Batches of the epoch that are done.
    seconds
        Time that these batches took.
    lr
        Learning rate at the start of the epoch.
    order
        State of the generator from which the epoch's order was drawn; None before its first batch.
    """

    epoch: int = 1
    batch: int = 0
    seconds: float = 0.0
    lr: float = 0.0
    order: Tensor | None = None


class Trainer:
    """A model in training, with everything that its next step depends on.

    Parameters
    ----------
    model
        The model, on its device; it is trained in place.
    recipe
        The components of the training.
    data
        The data, on the same device.
    threat, seed
        Threat model and seed of the run.
    terminal
        Where progress and warnings are printed.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        data: TrainingData,
        threat: Threat,
        *,
        seed: int,
        terminal: Terminal,
    ) -> None:
        self.model, self.defense, self.settings = model, recipe.defense, recipe.settings
        # The defense as the curriculum has scheduled it, with its state.
        self.scheduled_defense = recipe.defense
        self.train, self.validation = data.train, data.validation
        self.threat, self.seed, self.terminal = threat, seed, terminal
        _refuse_too_few(data.train)
        ready = prepare(model, recipe.settings, data.train, seed)
        self.engine = Engine(ready, recipe, data, seed, terminal.say)
        self.order = data.batches(recipe.settings.batch_size)
        self.batches_per_epoch = self.engine.per_epoch
        # Of the last validation; shown if a defense computes no clean or no adversarial logits.
        self.accuracies: dict[str, float | None] = {}
        self.position = _Position()
        self.metrics = EpochMetrics()
        self.history = TrainingHistory()
        # Weights and state at the start of the present epoch, if it may be rolled back.
        self.epoch_start: Mapping[str, Any] | None = None
        self.probe_images = probe_images(data.train, recipe.defense, threat.eps)
        validated = several_threats(recipe.defense) or (threat,)
        self.validate = Validator(model, validated, seed, terminal)

    def epochs(self) -> Iterator[Epoch]:
        """Train, yielding every finished epoch.

        Raises
        ------
        NonFiniteLossError
            If a loss is found to be NaN or infinite.
        """
        return (epoch for epoch in self.batches() if epoch is not None)

    def batches(self) -> Iterator[Epoch | None]:
        """Train from the present position, yielding after every batch.

        Yields the epoch after its last batch, and None after the others. Training can be resumed
        from `state_dict` at each yield.

        Raises
        ------
        NonFiniteLossError
            If a loss is found to be NaN or infinite.
        """
        total = self.settings.epochs * self.batches_per_epoch
        with self.terminal.progress("training", total) as bar:
            bar.advance((self.position.epoch - 1) * self.batches_per_epoch + self.position.batch)
            while self.position.epoch <= self.settings.epochs and not self.history.stopped:
                try:
                    yield from self._epoch(bar)
                except NonFiniteLossError as error:
                    if self.settings.on_nonfinite is not OnNonFinite.rollback:
                        raise
                    self._roll_back(error, bar)
                except OverfittedError as error:
                    self._roll_back(error, bar)

    @property
    def all_finite(self) -> bool:
        """Whether the weights and the losses of all processes are finite.

        Losses may be non-finite where such steps are skipped. Waits for the device and for the
        other processes.
        """
        skips = self.settings.on_nonfinite is OnNonFinite.skip
        here = (skips or self.metrics.all_finite) and is_finite(self.model)
        return all(distributed.all_gather(here))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next batches depend on, except the weights."""
        start = self.epoch_start if self.position.batch else None
        kept = {"course": asdict(self.history), "passes": asdict(self.engine.passes)}
        return {**self._rollback_state(), **kept, "start": start}

    def per_process_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The part of `state`, a `state_dict`, that differs from process to process.

        BatchNorm's running statistics are added to it, since the saved weights have those of the
        first process only.
        """
        running = ddp.statistics(self.model)
        statistics = {name: value.cpu() for name, value in running.items()}
        return {**{key: state[key] for key in PER_PROCESS}, "statistics": statistics}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; the model already has its weights.

        `state` may include the `per_process_state` of this process.
        """
        self.model.load_state_dict(state.get("statistics", {}), strict=False)
        self._restore(state)
        self.history = TrainingHistory(**renames.history(state["course"]))
        # Checkpoints of earlier versions have none.
        self.engine.passes = Passes(**state.get("passes", {}))
        self.epoch_start = state["start"]

    def _rollback_state(self) -> dict[str, Any]:
        """The state that a rollback restores, except the weights."""
        defense = self.scheduled_defense
        return {
            **self.engine.state_dict(),
            "position": asdict(self.position),
            "tally": self.metrics.state_dict(),
            "accuracies": self.accuracies,
            "defense": defense.state_dict() if isinstance(defense, Stateful) else {},
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.position = _Position(**state["position"])
        self.metrics = EpochMetrics()
        self.metrics.load_state_dict(state["tally"], self.train.device)
        self.accuracies = dict(state["accuracies"])
        if isinstance(self.scheduled_defense, Stateful):
            self.scheduled_defense.load_state_dict(state["defense"])
        self.engine.load_state_dict(state)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the model its averaged weights in this block, if weights are averaged."""
        with self.engine.average.installed(self._recompute_statistics):
            yield

    def _recompute_statistics(self) -> None:
        """Set BatchNorm's running statistics to those of the clean training images."""
        before = self.engine.randomness.state_dict()
        order = batches(
            self.train, self.history.microbatch_size or self.settings.batch_size,
            generator_for(self.seed, "statistics"),
            part=distributed.rank(), parts=distributed.size(),
        )  # fmt: skip
        recompute_statistics(self.model, (x for x, _ in order))
        ddp.average_statistics(self.model)
        self.engine.randomness.load_state_dict(before)

    def _epoch(self, bar: Bar) -> Iterator[Epoch | None]:
        settings, position = self.settings, self.position
        number = position.epoch
        if settings.rolls_back and position.batch == 0:
            state = {"model": self.model.state_dict(), **self._rollback_state()}
            self.epoch_start = copy.deepcopy(state)
        defense = self._defense_for(number)
        self._set_order()
        started = time.perf_counter() - position.seconds
        order = self.order.epoch(self.engine.streams["batches"], number, position.batch)
        self.model.train()
        for x, y in order:
            if settings.curriculum.per_batch:
                defense = self._defense_for(number)
            rate = self.engine.lr * self.history.lr_factor
            batch = Batch(x, y, number, self._loss_weight(len(y)))
            for objective in self.engine.train_batch_within_memory(defense, batch, self.history):
                self.metrics.add(position.batch + 1, rate, objective, y)
            position.batch += 1
            position.seconds = time.perf_counter() - started
            bar.advance()
            if position.batch % BATCHES_BETWEEN_CHECKS == 0:
                self._check()
            if bar.due:
                where = f"{position.batch}/{self.batches_per_epoch}"
                loss, accuracies = self.metrics.latest()
                figures = {**self.accuracies, **accuracies, "loss": loss}
                bar.show(f"epoch {number}/{settings.epochs} {where}", **figures)
            if position.batch < self.batches_per_epoch:
                yield None
        yield self._finish_epoch()

    def _defense_for(self, epoch: int) -> Defense:
        """The defense as the curriculum schedules it for the next batch of `epoch`."""
        before, passed = self.scheduled_defense, self.position.batch / self.batches_per_epoch
        curriculum = self.settings.curriculum
        defense = curriculum.at(self.defense, epoch, self.settings.epochs, passed)
        if isinstance(before, Stateful) and isinstance(defense, Stateful):
            defense.load_state_dict(before.state_dict())
        self.scheduled_defense = defense
        return defense

    def _set_order(self) -> None:
        """Set the generator of the order of batches to its state at the start of the epoch."""
        if self.position.order is None:
            self.position.order = self.engine.streams["batches"].get_state()
            self.position.lr = self.engine.lr * self.history.lr_factor
        self.engine.streams["batches"].set_state(self.position.order)

    def _finish_epoch(self) -> Epoch:
        """Finish the epoch: validate, build its row, and reset for the next one."""
        position = self.position
        self._check()
        if not is_finite(self.model):
            raise NonFiniteLossError(f"non-finite weights in epoch {position.epoch}")
        figures = self.metrics.figures(position.epoch)
        ddp.average_statistics(self.model)
        size = self.history.microbatch_size or self.settings.batch_size
        attack, on_overfit = self.settings.validation_attack, self.settings.on_overfit
        with self.averaged():
            clean, robust = self.validate("validation", self.validation, attack, size)
        _, pgd = self.validate("overfitting", self.probe_images, probe(self.threat), size)
        whole_ball = trains_on_ball(self.scheduled_defense, self.threat)
        training = figures["train_robust_accuracy"] if whole_ball else None
        overfitting = self.history.end_epoch(pgd, on_overfit, training)
        epoch = Epoch(
            position.epoch, position.seconds, position.lr, **figures, val_clean_accuracy=clean,
            val_robust_accuracy=robust, train_pgd_accuracy=pgd, **overfitting,
        )  # fmt: skip
        self.accuracies = {"clean": clean, "robust": robust}
        self.position, self.metrics = _Position(position.epoch + 1), EpochMetrics()
        return epoch

    def _check(self) -> None:
        if self.settings.on_nonfinite is not OnNonFinite.skip:
            self.metrics.check(self.position.epoch)

    def _loss_weight(self, images: int) -> float:
        """Weight of the mean loss over this process's `images` in the mean over processes."""
        return distributed.size() * images / self.order.images(self.position.batch)

    def _roll_back(self, reason: Exception, bar: Bar) -> None:
        """Return to the start of the epoch, and halve the learning rate from there on."""
        if not self.history.may_roll_back:
            raise NonFiniteLossError(f"{reason} ({MAX_ROLLBACKS} rollbacks did not help)")
        assert self.epoch_start is not None
        bar.advance(-self.position.batch)
        self.model.load_state_dict(self.epoch_start["model"])
        self._restore(self.epoch_start)
        self.history.roll_back()
        number = self.position.epoch
        self.terminal.say(f"restarting epoch {number} at half the learning rate: {reason}")


def _refuse_too_few(train: Samples) -> None:
    if train.size < distributed.size():
        problem = f"cannot be divided over {distributed.size()} processes"
        raise InputError(f"{train.size} training images", problem=problem)
