"""The training loop: epochs of batches, each defense's objectives descended one by one."""

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from robusttrain import distributed, ranges, replicas
from robusttrain.attacks import Attack
from robusttrain.curriculum import Curriculum
from robusttrain.data import Dataset, Samples, as_input, augment, batch_count, batches, bounds
from robusttrain.defenses import Defense, Objective, Stateful
from robusttrain.descent import Descent, OnNonFinite, groups, is_finite
from robusttrain.errors import InputError, NonFiniteLossError
from robusttrain.health import (
    MOST_ROLLBACKS,
    Course,
    OnOverfit,
    OverfittedError,
    probe,
    watched,
)
from robusttrain.looking import Look
from robusttrain.noise import Progress, penalty
from robusttrain.noise.draws import SameDraws, wanted_draws
from robusttrain.optimizers import Optimizer
from robusttrain.precision import Precision, safe
from robusttrain.randomness import Randomness
from robusttrain.report.terminal import Bar, Terminal
from robusttrain.schedules import Schedule
from robusttrain.splitting import halved, is_out_of_memory, notice, parted
from robusttrain.tally import Epoch, Tally
from robusttrain.threat import Norm

# Looking at a loss waits for the device, and looking late wastes what comes after a NaN.
BATCHES_BETWEEN_CHECKS = 50


@dataclass
class Training:
    """How long and in what form a model is trained.

    Parameters
    ----------
    epochs
        Passes over the training split, 0 or more.
    batch_size
        Images a step, 1 or more; of each process, where several train together.
    label_smoothing
        Share of the target spread over all classes, from 0 to below 1; in the outer loss only.
    clip_gradient
        Largest l2 norm of the gradient of all parameters together; not clipped where not given.
    precision
        bf16 autocast, or float32; `auto` takes bf16 on devices that have instructions for it: CUDA
        from compute capability 8.0 on, CPUs with AVX512-BF16 or AMX.
    channels_last
        Keep images and weights with channels innermost, as fast convolutions want them.
    compile
        Run training through `torch.compile`.
    sync_batchnorm
        Whether BatchNorm layers take the statistics of the images of all processes, where several
        train together, rather than of their own.
    curriculum
        Growth of the training attack over the epochs.
    validation_attack
        The attack whose accuracy on the validation split chooses `best.pt`.
    checkpoint_minutes
        Minutes, above 0, after which `checkpoint.pt` is written within an epoch too.
    on_nonfinite
        What is done where a loss or its gradient is not finite.
    on_overfit
        What is done when accuracy on training images under PGD-10, measured after each epoch of a
        training against adversarial images, falls by more than 20 points below its best.
    """

    epochs: int = 20
    batch_size: int = 128
    label_smoothing: float = 0.0
    clip_gradient: float | None = None
    precision: Precision = Precision.auto
    channels_last: bool = True
    compile: bool = False
    sync_batchnorm: bool = False
    curriculum: Curriculum = field(default_factory=Curriculum)
    validation_attack: Attack | None = None
    checkpoint_minutes: float = 10.0
    on_nonfinite: OnNonFinite = OnNonFinite.stop
    on_overfit: OnOverfit = OnOverfit.warn

    def __post_init__(self) -> None:
        ranges.at_least(0, epochs=self.epochs)
        ranges.at_least(1, batch_size=self.batch_size)
        ranges.above(0, checkpoint_minutes=self.checkpoint_minutes)
        ranges.require(
            0 <= self.label_smoothing < 1,
            "label_smoothing",
            self.label_smoothing,
            "from 0 to below 1",
        )
        if self.clip_gradient is not None:
            ranges.above(0, clip_gradient=self.clip_gradient)
        ranges.one_of(list(OnNonFinite), on_nonfinite=self.on_nonfinite)
        ranges.one_of(list(OnOverfit), on_overfit=self.on_overfit)
        # Plain words are welcome in a notebook, but `is` knows members only.
        self.on_nonfinite = OnNonFinite(self.on_nonfinite)
        self.on_overfit = OnOverfit(self.on_overfit)

    @property
    def rolls_back(self) -> bool:
        """Whether an epoch can be begun again."""
        return self.on_nonfinite is OnNonFinite.rollback or self.on_overfit is OnOverfit.rollback


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
    train, validation
        For use on the same device. The validation split may be empty.
    dataset
        For its augmentation.
    norm, eps, seed
        Of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        defense: Defense,
        optimizer: Optimizer,
        schedule: Schedule,
        settings: Training,
        *,
        train: Samples,
        validation: Samples,
        dataset: Dataset,
        norm: Norm,
        eps: float,
        seed: int,
        terminal: Terminal,
    ) -> None:
        self.model, self.defense, self.settings = model, defense, settings
        # As the curriculum has it in the epoch under way, with what it keeps from batch to batch.
        self.present = defense
        self.train, self.validation, self.dataset = train, validation, dataset
        self.norm, self.eps, self.seed, self.terminal = norm, eps, seed, terminal
        device = train.device
        self.device = device
        self.memory_format = (
            torch.channels_last if settings.channels_last else torch.contiguous_format
        )
        self.model.to(memory_format=self.memory_format)
        self.precision = settings.precision
        if device.type == "cpu" and settings.precision.is_bf16(device):
            first = train.take(torch.tensor([0])).loaded()
            self.precision = safe(settings.precision, model, as_input(first.images))
        _refuse_too_few(train)
        if settings.sync_batchnorm:
            replicas.synchronise_batch_norm(model)
        replicas.part_ways(model, seed)
        self.forward = replicas.replicated(_compiled(model) if settings.compile else model)
        self.draws = wanted_draws(model)
        self.loss = partial(
            F.cross_entropy, reduction="none", label_smoothing=settings.label_smoothing
        )
        self.batches_per_epoch = batch_count(train.size, settings.batch_size, distributed.size())
        self.optimizer = optimizer.build(groups(model))
        skips = settings.on_nonfinite is OnNonFinite.skip
        self.descent = Descent(self.forward, self.optimizer, settings.clip_gradient, skips)
        steps = max(1, settings.epochs * self.batches_per_epoch)
        self.scheduler = schedule.build(self.optimizer, steps)
        # What is known of the model where a defense computes no clean or no adversarial logits.
        self.accuracies: dict[str, float | None] = {}
        self.randomness = Randomness(model, seed, device)
        self.streams = self.randomness.streams
        self.position = _Position()
        self.tally = Tally()
        self.course = Course()
        # Where the present epoch began, for those who want to go back there.
        self.start: Mapping[str, Any] | None = None
        self.watched = watched(train, defense, eps)
        self.look = Look(model, norm, eps, seed, terminal)

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

        Whenever this yields, `state` is what training goes on from.

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
        return all(distributed.everyones(here))

    def state(self) -> dict[str, Any]:
        """Everything beside the weights that the next batches depend on."""
        course, start = asdict(self.course), self.start if self.position.batch else None
        return {**self._moment(), "course": course, "start": start}

    def _moment(self) -> dict[str, Any]:
        """What a rollback undoes, beside the weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random_states": self.randomness.state(),
            "position": asdict(self.position),
            "tally": self.tally.state(),
            "accuracies": self.accuracies,
            "defense": self.present.state_dict() if isinstance(self.present, Stateful) else {},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; the weights are the model's."""
        self._go_to(state)
        self.course, self.start = Course(**state["course"]), state["start"]

    def _go_to(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.position = _Position(**state["position"])
        self.tally = Tally.of(state["tally"], self.device)
        self.accuracies = dict(state["accuracies"])
        if isinstance(self.present, Stateful):
            self.present.load_state_dict(state["defense"])
        self.randomness.restore(state["random_states"])

    def step(
        self, defense: Defense, x: Tensor, y: Tensor, epoch: int = 1, weight: float = 1.0
    ) -> Iterator[Objective]:
        """Descend the objectives of one batch of images in [0, 1]; yields each after its step.

        `weight` is that of its loss among those of all processes, of which the mean is descended.
        """
        x = augment(x, self.dataset.crop, self.dataset.flip, self.streams["augmentation"])
        x = x.contiguous(memory_format=self.memory_format)
        while True:
            before = self.randomness.state()
            try:
                yield from self._objectives(defense, x, y, epoch, weight)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                _refuse_parts(len(y))
                self.course.most = halved(len(y), self.course.most, self.model)
                self.terminal.say(notice(self.course.most, self.model))
            # Behind the exception, which holds on to memory.
            self.randomness.restore(before)
        self.scheduler.step()

    def _objectives(
        self, defense: Defense, x: Tensor, y: Tensor, epoch: int, weight: float
    ) -> Iterator[Objective]:
        """Descend the objectives of a batch, in parts where it does not fit into memory whole."""
        parts = [
            (
                len(labels) / len(y),
                defense(
                    self._view(), images, labels, loss=self._loss, generator=self.streams["attack"]
                ),
            )
            for images, labels in parted(x, y, self.course.most, self.model)
        ]
        return self.descent.descend(
            parts,
            autocast=partial(self.precision.autocast, self.device),
            penalty=partial(penalty, self.model, Progress(epoch, self.train.size)),
            weight=weight,
            rate_share=self.course.rate_share,
        )

    def _epoch(self, bar: Bar) -> Iterator[Epoch | None]:
        settings, position = self.settings, self.position
        number = position.epoch
        if settings.rolls_back and position.batch == 0:
            self.start = copy.deepcopy({"model": self.model.state_dict(), **self._moment()})
        defense = self._defense_in(number)
        self._draw_order()
        started = time.perf_counter() - position.seconds
        order = batches(
            self.train, settings.batch_size, self.streams["batches"],
            first=position.batch, part=distributed.rank(), parts=distributed.size(),
        )  # fmt: skip
        self.model.train()
        for x, y in order:
            rate = self.optimizer.param_groups[0]["lr"] * self.course.rate_share
            for objective in self.step(defense, x, y, number, self._weight(len(y))):
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
        """The defense as it is in `epoch`, with what it has kept of earlier ones."""
        before = self.present
        self.present = self.settings.curriculum.at(self.defense, epoch, self.settings.epochs)
        if isinstance(before, Stateful) and isinstance(self.present, Stateful):
            self.present.load_state_dict(before.state_dict())
        return self.present

    def _draw_order(self) -> None:
        """Have the order of an epoch drawn, anew or as it was when the epoch began."""
        if self.position.order is None:
            self.position.order = self.streams["batches"].get_state()
            self.position.lr = float(self.scheduler.get_last_lr()[0]) * self.course.rate_share
        self.streams["batches"].set_state(self.position.order)

    def _ended(self) -> Epoch:
        """What the epoch came to; the next one is next."""
        position = self.position
        self._check()
        if not is_finite(self.model):
            raise NonFiniteLossError(f"weights are not finite any more in epoch {position.epoch}")
        figures = self.tally.figures(position.epoch)
        replicas.average_statistics(self.model)
        size, attack = self.course.most or self.settings.batch_size, self.settings.validation_attack
        clean, robust = self.look("validation", self.validation, attack, size)
        _, pgd = self.look("overfitting", self.watched, probe(self.norm, self.eps), size)
        course = self.course.judged(pgd, self.settings.on_overfit)
        epoch = Epoch(
            position.epoch, position.seconds, position.lr, **figures,
            val_clean_accuracy=clean, val_robust_accuracy=robust, train_pgd_accuracy=pgd, **course,
        )  # fmt: skip
        self.accuracies = {"clean": clean, "robust": robust}
        self.position, self.tally = _Position(position.epoch + 1), Tally()
        return epoch

    def _check(self) -> None:
        if self.settings.on_nonfinite is not OnNonFinite.skip:
            self.tally.check(self.position.epoch)

    def _weight(self, images: int) -> float:
        """What the mean loss of so many images counts in a mean over processes."""
        parts = distributed.size()
        at = self.train.size, self.settings.batch_size, self.position.batch, parts
        start, stop = bounds(*at)
        return parts * images / (stop - start)

    def _view(self) -> nn.Module:
        """The model as a defense gets it for some images."""
        if self.draws is None:
            return self.forward
        view = SameDraws(self.forward, self.draws)
        view.renew(self.streams["same draws"])
        return view

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The outer loss of each image, (N,), on average over its draws where there are several."""
        draws = len(logits) // len(y)
        return self.loss(logits, y.repeat_interleave(draws)).view(-1, draws).mean(1)

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
        raise InputError(
            f"{train.size} training images cannot be divided over {distributed.size()} processes"
        )


def _refuse_parts(images: int) -> None:
    if distributed.size() > 1:
        # The others would wait for the gradients of a whole batch.
        raise InputError(
            f"batch_size={images} does not fit into memory, and several processes do not compute "
            f"it in parts: try batch_size={max(1, images // 2)}"
        )


def _compiled(model: nn.Module) -> nn.Module:
    # Dynamo takes a model with other hooks for one that it has compiled before, and drops noise.
    torch.compiler.reset()
    return cast(nn.Module, torch.compile(model))
