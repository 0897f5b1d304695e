"""The training loop: epochs of batches, each defense's objectives descended one by one."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from robusttrain import distributed, ranges, replicas, streams
from robusttrain.attacks import Attack
from robusttrain.curriculum import Curriculum
from robusttrain.data import (
    Dataset,
    Samples,
    as_input,
    augment,
    batch_count,
    batches,
    bounds,
    portions,
)  # fmt: skip
from robusttrain.defenses import Defense, Objective, Stateful
from robusttrain.errors import InputError
from robusttrain.evaluation import Evaluation, evaluate
from robusttrain.evaluation.randomised import least_votes
from robusttrain.noise import Progress, noise_layers, penalty
from robusttrain.noise.draws import SameDraws, wanted_draws
from robusttrain.optimizers import Optimizer
from robusttrain.precision import Precision, safe
from robusttrain.report.terminal import Bar, Terminal
from robusttrain.schedules import Schedule
from robusttrain.tally import Epoch, Tally
from robusttrain.threat import Norm


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
        draws = wanted_draws(model)
        self.same_draws = SameDraws(self.forward, draws) if draws else None
        self.loss = partial(
            F.cross_entropy, reduction="none", label_smoothing=settings.label_smoothing
        )
        self.batches_per_epoch = batch_count(train.size, settings.batch_size, distributed.size())
        self.optimizer = optimizer.build(_groups(model))
        steps = max(1, settings.epochs * self.batches_per_epoch)
        self.scheduler = schedule.build(self.optimizer, steps)
        # What is known of the model where a defense computes no clean or no adversarial logits.
        self.accuracies: dict[str, float | None] = {}
        own = distributed.own_seed(seed)
        self.streams = {
            # All processes take their parts of the same batches.
            "batches": streams.stream(seed, "batches"),
            "augmentation": streams.stream(own, "augmentation", device),
            "attack": streams.stream(own, "training attack", device),
            "same draws": streams.stream(own, "same draws"),
        }
        self.position = _Position()
        self.tally = Tally()

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
            while self.position.epoch <= self.settings.epochs:
                yield from self._epoch(bar)

    def state(self) -> dict[str, Any]:
        """Everything beside the weights that the next batches depend on."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random_states": self.random_states(),
            "position": asdict(self.position),
            "tally": self.tally.state(),
            "accuracies": self.accuracies,
            "defense": self.present.state_dict() if isinstance(self.present, Stateful) else {},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; the weights are the model's."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.position = _Position(**state["position"])
        self.tally = Tally.of(state["tally"], self.device)
        self.accuracies = dict(state["accuracies"])
        if isinstance(self.present, Stateful):
            self.present.load_state_dict(state["defense"])
        states = state["random_states"]
        torch.set_rng_state(states["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states["device"], self.device)
        for name, stream in self.streams.items():
            stream.set_state(states["streams"][name])
        for layer, of_layer in zip(noise_layers(self.model), states["noise"], strict=True):
            layer.restore_random_states(of_layer)

    def random_states(self) -> dict[str, Any]:
        """The state of every random stream that training draws from."""
        on_cuda = self.device.type == "cuda"
        return {
            "torch": torch.get_rng_state(),
            "device": torch.cuda.get_rng_state(self.device) if on_cuda else None,
            "streams": {name: stream.get_state() for name, stream in self.streams.items()},
            "noise": [layer.random_states() for layer in noise_layers(self.model)],
        }

    def step(
        self, defense: Defense, x: Tensor, y: Tensor, epoch: int = 1, weight: float = 1.0
    ) -> Iterator[Objective]:
        """Descend the objectives of one batch of images in [0, 1]; yields each after its step.

        `weight` is that of its loss among those of all processes, of which the mean is descended.
        """
        x = augment(x, self.dataset.crop, self.dataset.flip, self.streams["augmentation"])
        x = x.contiguous(memory_format=self.memory_format)
        model = self._view()
        objectives = defense(model, x, y, loss=self._loss, generator=self.streams["attack"])
        while True:
            # Autocast covers what the defense computes up to its next yield, not the step between.
            with self.precision.autocast(self.device):
                objective = next(objectives, None)
            if objective is None:
                break
            extra = penalty(self.model, Progress(epoch, self.train.size))
            loss = objective.loss if weight == 1 else weight * objective.loss
            self._descend(loss if extra is None else loss + extra)
            yield objective
        self.scheduler.step()

    def _epoch(self, bar: Bar) -> Iterator[Epoch | None]:
        settings, position = self.settings, self.position
        number = position.epoch
        defense = self._defense_in(number)
        self._draw_order()
        started = time.perf_counter() - position.seconds
        order = batches(
            self.train, settings.batch_size, self.streams["batches"],
            first=position.batch, part=distributed.rank(), parts=distributed.size(),
        )  # fmt: skip
        self.model.train()
        for x, y in order:
            rate = self.optimizer.param_groups[0]["lr"]
            for objective in self.step(defense, x, y, number, self._weight(len(y))):
                self.tally.add(position.batch + 1, rate, objective, y)
            position.batch += 1
            position.seconds = time.perf_counter() - started
            bar.advance()
            if bar.due:
                where = f"{position.batch}/{self.batches_per_epoch}"
                loss, accuracies = self.tally.shown(number)
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
            self.position.lr = float(self.scheduler.get_last_lr()[0])
        self.streams["batches"].set_state(self.position.order)

    def _ended(self) -> Epoch:
        """What the epoch came to; the next one is next."""
        number = self.position.epoch
        figures = self.tally.figures(number)
        replicas.average_statistics(self.model)
        validated = self._validate()
        self.accuracies = {
            "clean": validated["val_clean_accuracy"],
            "robust": validated["val_robust_accuracy"],
        }
        epoch = Epoch(number, self.position.seconds, self.position.lr, **figures, **validated)
        self.position, self.tally = _Position(number + 1), Tally()
        return epoch

    def _weight(self, images: int) -> float:
        """What the mean loss of so many images counts in a mean over processes."""
        parts = distributed.size()
        at = self.train.size, self.settings.batch_size, self.position.batch, parts
        start, stop = bounds(*at)
        return parts * images / (stop - start)

    def _view(self) -> nn.Module:
        """The model as defenses get it."""
        if self.same_draws is None:
            return self.forward
        self.same_draws.renew(self.streams["same draws"])
        return self.same_draws

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The outer loss of each image, (N,), on average over its draws where there are several."""
        draws = len(logits) // len(y)
        return self.loss(logits, y.repeat_interleave(draws)).view(-1, draws).mean(1)

    def _descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if isinstance(self.forward, replicas.Replicas):
            self.forward.refuse_unused()
        if self.settings.clip_gradient is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_gradient)
        self.optimizer.step()

    def _validate(self) -> dict[str, Any]:
        attack = self.settings.validation_attack
        if self.validation.size == 0 or attack is None:
            return {"val_clean_accuracy": None, "val_robust_accuracy": None}
        # Few draws for a model that predicts at random: this only ranks epochs.
        votes = max(10, least_votes(self.model))
        settings = Evaluation(
            {"validation": attack}, batch_size=self.settings.batch_size, eot=1, votes=votes
        )
        mine = _part(self.validation)
        seed = distributed.own_seed(streams.derived_seed(self.seed, "validation"))
        broken = {"clean": 0, "robust": 0}
        with self.terminal.progress("validation", mine.size) as bar:
            for portion in portions(mine, self.settings.batch_size):
                ledger = evaluate(
                    self.model, portion, settings, norm=self.norm, eps=self.eps, seed=seed, bar=bar
                )
                broken["clean"] += int(ledger.misclassified.sum())
                broken["robust"] += int(ledger.worst_case.sum())
        total = distributed.summed(broken)
        return {
            f"val_{name}_accuracy": 1 - count / self.validation.size
            for name, count in total.items()
        }


def _part(split: Samples) -> Samples:
    """What this process looks at of a split."""
    if distributed.size() == 1:
        return split
    return split.take(torch.arange(split.size)[distributed.share(split.size)])


def _refuse_too_few(train: Samples) -> None:
    if train.size < distributed.size():
        raise InputError(
            f"{train.size} training images cannot be divided over {distributed.size()} processes"
        )


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups: weight decay would silence noise whose size is learnt."""
    of_noise = {id(p) for layer in noise_layers(model) for p in layer.parameters()}
    own = [p for p in model.parameters() if id(p) not in of_noise]
    learnt = [p for p in model.parameters() if id(p) in of_noise]
    groups: list[dict[str, Any]] = [{"params": own}]
    return [*groups, {"params": learnt, "weight_decay": 0.0}] if learnt else groups


def _compiled(model: nn.Module) -> nn.Module:
    # Dynamo takes a model with other hooks for one that it has compiled before, and drops noise.
    torch.compiler.reset()
    return cast(nn.Module, torch.compile(model))
