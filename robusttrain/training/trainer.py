"""The training loop: epochs of batches, and a look at what each epoch came to."""

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from robusttrain.data import Samples, batches, bounds
from robusttrain.defenses import Defense, Stateful
from robusttrain.errors import InputError, NonFiniteLossError
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
    MOST_ROLLBACKS,
    OverfittedError,
    TrainingHistory,
    covers,
    probe,
    watched_images,
)
from robusttrain.training.recipe import Recipe, TrainingData
from robusttrain.training.settings import OnNonFinite
from robusttrain.training.validation import Validator

# Looking at a loss waits for the device, and looking late wastes what comes after a NaN.
BATCHES_BETWEEN_CHECKS = 50

# Keys of the state of a training that differ between the processes that take part in it.
PER_PROCESS = ("random_states", "tally", "defense", "start")


@dataclass
class _Position:
    """Between which two batches training is.

    Parameters
    ----------
    epoch
        The epoch under way, from 1 on.
    batch
        Batches of it that are done.
    seconds
        Time that they took.
    lr
        Learning rate at its start.
    order
        State of the stream that its order was drawn from; None before its first batch.
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
        On its device; it is trained in place.
    recipe
        What the training consists of.
    data
        On the same device.
    threat, seed
        Of the run.
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
        # As the curriculum has it in the epoch under way, with what it keeps from batch to batch.
        self.present = recipe.defense
        self.train, self.validation = data.train, data.validation
        self.threat, self.seed, self.terminal = threat, seed, terminal
        _refuse_too_few(data.train)
        ready = prepare(model, recipe.settings, data.train, seed)
        self.engine = Engine(ready, recipe, data, seed, terminal.say)
        self.batches_per_epoch = self.engine.per_epoch
        # What is known of the model where a defense computes no clean or no adversarial logits.
        self.accuracies: dict[str, float | None] = {}
        self.position = _Position()
        self.tally = EpochMetrics()
        self.course = TrainingHistory()
        # Where the present epoch began, for those who want to go back there.
        self.start: Mapping[str, Any] | None = None
        self.watched = watched_images(data.train, recipe.defense, threat.eps)
        self.validate = Validator(model, threat, seed, terminal)

    def epochs(self) -> Iterator[Epoch]:
        """Train, yielding after every epoch.

        Raises
        ------
        NonFiniteLossError
            As soon as a loss that is NaN or infinite is seen.
        """
        return (epoch for epoch in self.batches() if epoch is not None)

    def batches(self) -> Iterator[Epoch | None]:
        """Train on from where it is, yielding after every batch: the epoch, where it was its last.

        Whenever this yields, `state_dict` is what training goes on from.

        Raises
        ------
        NonFiniteLossError
            As soon as a loss that is NaN or infinite is seen.
        """
        total = self.settings.epochs * self.batches_per_epoch
        with self.terminal.progress("training", total) as bar:
            bar.advance((self.position.epoch - 1) * self.batches_per_epoch + self.position.batch)
            while self.position.epoch <= self.settings.epochs and not self.course.stopped:
                try:
                    yield from self._epoch(bar)
                except NonFiniteLossError as error:
                    if self.settings.on_nonfinite is not OnNonFinite.rollback:
                        raise
                    self._roll_back(error, bar)
                except OverfittedError as error:
                    self._roll_back(error, bar)

    @property
    def sound(self) -> bool:
        """Whether all is finite that must be, weights above all, in every process.

        Waits for the device, and for the others.
        """
        skips = self.settings.on_nonfinite is OnNonFinite.skip
        here = (skips or self.tally.sound) and is_finite(self.model)
        return all(distributed.all_gather(here))

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the weights that the next batches depend on."""
        course, start = asdict(self.course), self.start if self.position.batch else None
        return {**self._moment(), "course": course, "start": start}

    def per_process_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """What of `state`, which `state_dict` has given, this process has for itself.

        With it are BatchNorm's running statistics, which are in the saved weights of the first
        process only.
        """
        running = ddp.statistics(self.model)
        statistics = {name: value.cpu() for name, value in running.items()}
        return {**{key: state[key] for key in PER_PROCESS}, "statistics": statistics}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; the weights are the model's.

        It may have the `per_process_state` of this process in it.
        """
        self.model.load_state_dict(state.get("statistics", {}), strict=False)
        self._go_to(state)
        self.course, self.start = TrainingHistory(**state["course"]), state["start"]

    def _moment(self) -> dict[str, Any]:
        """What a rollback undoes, beside the weights."""
        return {
            **self.engine.state_dict(),
            "position": asdict(self.position),
            "tally": self.tally.state_dict(),
            "accuracies": self.accuracies,
            "defense": self.present.state_dict() if isinstance(self.present, Stateful) else {},
        }

    def _go_to(self, state: Mapping[str, Any]) -> None:
        self.position = _Position(**state["position"])
        self.tally = EpochMetrics()
        self.tally.load_state_dict(state["tally"], self.train.device)
        self.accuracies = dict(state["accuracies"])
        if isinstance(self.present, Stateful):
            self.present.load_state_dict(state["defense"])
        self.engine.load_state_dict(state)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model have its averaged weights in this block, where weights are averaged."""
        with self.engine.average.installed(self._recompute_statistics):
            yield

    def _recompute_statistics(self) -> None:
        """Let BatchNorm's running statistics be those of the clean training images."""
        before = self.engine.randomness.state_dict()
        order = batches(
            self.train, self.course.most or self.settings.batch_size,
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
            self.start = copy.deepcopy({"model": self.model.state_dict(), **self._moment()})
        defense = self._defense_in(number)
        self._draw_order()
        started = time.perf_counter() - position.seconds
        order = batches(
            self.train, settings.batch_size, self.engine.streams["batches"],
            first=position.batch, part=distributed.rank(), parts=distributed.size(),
        )  # fmt: skip
        self.model.train()
        for x, y in order:
            if settings.curriculum.per_batch:
                defense = self._defense_in(number)
            rate = self.engine.lr * self.course.rate_share
            batch = Batch(x, y, number, self._weight(len(y)))
            for objective in self.engine.train_batch_within_memory(defense, batch, self.course):
                self.tally.add(position.batch + 1, rate, objective, y)
            position.batch += 1
            position.seconds = time.perf_counter() - started
            bar.advance()
            if position.batch % BATCHES_BETWEEN_CHECKS == 0:
                self._check()
            if bar.due:
                where = f"{position.batch}/{self.batches_per_epoch}"
                loss, accuracies = self.tally.shown()
                figures = {**self.accuracies, **accuracies, "loss": loss}
                bar.show(f"epoch {number}/{settings.epochs} {where}", **figures)
            if position.batch < self.batches_per_epoch:
                yield None
        yield self._ended()

    def _defense_in(self, epoch: int) -> Defense:
        """The defense as it is now, in `epoch`, with what it has kept of earlier batches."""
        before, passed = self.present, self.position.batch / self.batches_per_epoch
        curriculum = self.settings.curriculum
        self.present = curriculum.at(self.defense, epoch, self.settings.epochs, passed)
        if isinstance(before, Stateful) and isinstance(self.present, Stateful):
            self.present.load_state_dict(before.state_dict())
        return self.present

    def _draw_order(self) -> None:
        """Have the order of an epoch drawn, anew or as it was when the epoch began."""
        if self.position.order is None:
            self.position.order = self.engine.streams["batches"].get_state()
            self.position.lr = self.engine.lr * self.course.rate_share
        self.engine.streams["batches"].set_state(self.position.order)

    def _ended(self) -> Epoch:
        """Finish the epoch: validate, build its row, and reset for the next one."""
        position = self.position
        self._check()
        if not is_finite(self.model):
            raise NonFiniteLossError(f"non-finite weights in epoch {position.epoch}")
        figures = self.tally.figures(position.epoch)
        ddp.average_statistics(self.model)
        size, attack = self.course.most or self.settings.batch_size, self.settings.validation_attack
        with self.averaged():
            clean, robust = self.validate("validation", self.validation, attack, size)
        _, pgd = self.validate("overfitting", self.watched, probe(self.threat), size)
        own = figures["train_robust_accuracy"]
        full = covers(self.present, self.threat)
        course = self.course.judged(pgd, self.settings.on_overfit, own if full else None)
        epoch = Epoch(
            position.epoch, position.seconds, position.lr, **figures,
            val_clean_accuracy=clean, val_robust_accuracy=robust, train_pgd_accuracy=pgd, **course,
        )  # fmt: skip
        self.accuracies = {"clean": clean, "robust": robust}
        self.position, self.tally = _Position(position.epoch + 1), EpochMetrics()
        return epoch

    def _check(self) -> None:
        if self.settings.on_nonfinite is not OnNonFinite.skip:
            self.tally.check(self.position.epoch)

    def _weight(self, images: int) -> float:
        """Weight of this process's mean loss in the mean over processes."""
        parts = distributed.size()
        at = self.train.size, self.settings.batch_size, self.position.batch, parts
        start, stop = bounds(*at)
        return parts * images / (stop - start)

    def _roll_back(self, reason: Exception, bar: Bar) -> None:
        """Go back to where the epoch began, at half the learning rate from there on."""
        if not self.course.may_roll_back:
            raise NonFiniteLossError(f"{reason} ({MOST_ROLLBACKS} rollbacks did not help)")
        assert self.start is not None
        bar.advance(-self.position.batch)
        self.model.load_state_dict(self.start["model"])
        self._go_to(self.start)
        self.course.roll_back()
        number = self.position.epoch
        self.terminal.say(f"epoch {number} begins again at half the learning rate: {reason}")


def _refuse_too_few(train: Samples) -> None:
    if train.size < distributed.size():
        problem = f"cannot be divided over {distributed.size()} processes"
        raise InputError(f"{train.size} training images", problem=problem)
