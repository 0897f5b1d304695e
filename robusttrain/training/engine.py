"""The steps of a training: what happens between a batch of images and the weights after it."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from robusttrain.data import Dataset, Samples, as_input, augment, batch_count
from robusttrain.defenses import Defense, Objective, Stateful
from robusttrain.errors import InputError
from robusttrain.noise.draws import SameDraws, wanted_draws
from robusttrain.noise.layer import Progress, penalty
from robusttrain.optim.averaging import Average, Averaging
from robusttrain.optim.optimizers import Optimizer
from robusttrain.optim.schedules import Schedule
from robusttrain.optim.weight_perturbation import WeightPerturbation
from robusttrain.runtime import distributed
from robusttrain.runtime.out_of_memory import is_out_of_memory
from robusttrain.training import ddp
from robusttrain.training.microbatches import halved, notice, parted
from robusttrain.training.optimizer_step import Descent, groups
from robusttrain.training.overfitting import Course
from robusttrain.training.precision import safe
from robusttrain.training.rng_state import Randomness
from robusttrain.training.settings import OnNonFinite, Training


class Steps:
    """A model that moves with every batch, and everything that its next step depends on.

    Parameters
    ----------
    model
        On its device; it is trained in place.
    train
        The training split, for use on the same device.
    dataset
        For its augmentation.
    seed
        Of the run.
    say
        Tells the user something.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: Schedule,
        weight_perturbation: WeightPerturbation,
        averaging: Averaging,
        settings: Training,
        *,
        train: Samples,
        dataset: Dataset,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.dataset, self.say = model, dataset, say
        self.device, self.images = train.device, train.size
        self.memory_format = (
            torch.channels_last if settings.channels_last else torch.contiguous_format
        )
        self.model.to(memory_format=self.memory_format)
        self.precision = settings.precision
        if self.device.type == "cpu" and settings.precision.is_bf16(self.device):
            first = train.take(torch.tensor([0])).loaded()
            self.precision = safe(settings.precision, model, as_input(first.images))
        if settings.sync_batchnorm:
            ddp.synchronise_batch_norm(model)
        ddp.part_ways(model, seed)
        self.forward = ddp.replicated(_compiled(model) if settings.compile else model)
        self.draws = wanted_draws(model)
        self.loss = partial(
            F.cross_entropy, reduction="none", label_smoothing=settings.label_smoothing
        )
        self.per_epoch = batch_count(train.size, settings.batch_size, distributed.size())
        self.total = max(1, settings.epochs * self.per_epoch)
        self.optimizer = optimizer.build(groups(model))
        skips = settings.on_nonfinite is OnNonFinite.skip
        repeats = weight_perturbation.at(1.0) is not None
        self.descent = Descent(self.forward, self.optimizer, settings.clip_gradient, skips, repeats)
        self.scheduler = schedule.build(self.optimizer, self.total)
        # Not the schedule's count, which one of the user's own need not have.
        self.batches = 0
        self.weight_perturbation = weight_perturbation
        self.average = Average(model, averaging)
        self.randomness = Randomness(model, seed, self.device)
        self.streams = self.randomness.streams

    @property
    def progress(self) -> float:
        """Share of the training that is over."""
        return self.batches / self.total

    @property
    def lr(self) -> float:
        """The schedule's rate of the next step."""
        return float(self.scheduler.get_last_lr()[0])

    def state(self) -> dict[str, Any]:
        """Everything beside the weights that the next step depends on."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "batches": self.batches,
            "average": self.average.state_dict(),
            "random_states": self.randomness.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; the weights are the model's."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.batches = state["batches"]
        self.average.load_state_dict(state["average"])
        self.randomness.restore(state["random_states"])

    def take(
        self,
        defense: Defense,
        x: Tensor,
        y: Tensor,
        course: Course,
        *,
        epoch: int = 1,
        weight: float = 1.0,
    ) -> Iterator[Objective]:
        """Descend the objectives of one batch of images in [0, 1]; yields each after its step.

        `weight` is that of its loss among those of all processes, of which the mean is descended.
        `course` learns how many images fit into memory.
        """
        x = augment(x, self.dataset.crop, self.dataset.flip, self.streams["augmentation"])
        x = x.contiguous(memory_format=self.memory_format)
        while True:
            before = self.randomness.state()
            try:
                yield from self._objectives(defense, x, y, course, epoch, weight)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                _refuse_parts(len(y), defense)
                course.most = halved(len(y), course.most, self.model)
                self.say(notice(course.most, self.model))
            # Behind the exception, which holds on to memory.
            self.randomness.restore(before)
        self.scheduler.step()
        self.batches += 1
        self.average.update(self.progress, epoch_ends=self._epoch_ends)

    @property
    def _epoch_ends(self) -> bool:
        return self.batches % self.per_epoch == 0

    def _objectives(
        self, defense: Defense, x: Tensor, y: Tensor, course: Course, epoch: int, weight: float
    ) -> Iterator[Objective]:
        """Descend the objectives of a batch, in parts where it does not fit into memory whole."""
        parts = [
            (
                len(labels) / len(y),
                defense(
                    self._view(), images, labels, loss=self._loss, generator=self.streams["attack"]
                ),
            )
            for images, labels in parted(x, y, course.most, self.model)
        ]
        return self.descent.descend(
            parts,
            autocast=partial(self.precision.autocast, self.device),
            penalty=partial(penalty, self.model, Progress(epoch, self.images)),
            weight=weight,
            rate_share=course.rate_share,
            offsets=self.weight_perturbation.at(self.progress),
        )

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


def _refuse_parts(images: int, defense: Defense) -> None:
    reason = None
    if distributed.size() > 1:
        # The others would wait for the gradients of a whole batch.
        reason = "several processes do"
    elif isinstance(defense, Stateful):
        # What it keeps for the places of a batch would be that of one part for all of them.
        reason = "a defense that keeps something from batch to batch does"
    if reason is not None:
        raise InputError(
            f"batch_size={images} does not fit into memory, and {reason} not compute "
            f"it in parts: try batch_size={max(1, images // 2)}"
        )


def _compiled(model: nn.Module) -> nn.Module:
    # Dynamo takes a model with other hooks for one that it has compiled before, and drops noise.
    torch.compiler.reset()
    return cast(nn.Module, torch.compile(model))
