"""One batch of training, from its images to the updated weights."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from robusttrain.attacks.images import images_are_valid
from robusttrain.data import augment
from robusttrain.defenses import Defense, Objective, Replayed, reusable
from robusttrain.errors import returned
from robusttrain.models.passes import Passes
from robusttrain.noise.draws import SameDraws, wanted_draws
from robusttrain.noise.layer import Progress, penalty
from robusttrain.optim.averaging import Average
from robusttrain.optim.schedules import Stepping
from robusttrain.optim.weight_perturbation import perturbed
from robusttrain.runtime.out_of_memory import is_out_of_memory
from robusttrain.training import ddp
from robusttrain.training.microbatches import (
    Microbatch,
    combined,
    detached,
    halved_size,
    refuse_microbatches,
    split_batch,
    split_notice,
)
from robusttrain.training.model_setup import ReadyModel
from robusttrain.training.optimizer_step import (
    SkippingStep,
    clip_gradient,
    scaled_lr,
)
from robusttrain.training.overfitting import TrainingHistory
from robusttrain.training.parameter_groups import parameter_groups, trained_weights
from robusttrain.training.recipe import Recipe, TrainingData
from robusttrain.training.rng_state import RngState
from robusttrain.training.settings import OnNonFinite


class Batch(NamedTuple):
    """The part of a batch that this process trains on, before augmentation.

    Parameters
    ----------
    x, y
        Images (N, C, H, W) in [0, 1] and labels (N,).
    epoch
        The epoch, from 1 on.
    weight
        Weight of this part's mean loss in the mean over processes.
    """

    x: Tensor
    y: Tensor
    epoch: int = 1
    weight: float = 1.0


class Engine:
    """A model in training, and everything else that its next step depends on.

    Parameters
    ----------
    ready
        The model, ready for training; it is trained in place.
    recipe
        The components of the training. Its defense is not used: each batch brings its own, as the
        curriculum has scheduled it.
    data
        The data, on the device of the model.
    seed
        The seed of the run.
    say
        Prints a line for the user.
    """

    def __init__(
        self,
        ready: ReadyModel,
        recipe: Recipe,
        data: TrainingData,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        settings = recipe.settings
        self.ready, self.model, self.forward = ready, ready.module, ready.forward
        batches = data.batches(settings.batch_size)
        self.dataset, self.images, self.say = data.dataset, batches.images_per_epoch, say
        self.draws = wanted_draws(self.model)
        self.cross_entropy = partial(
            F.cross_entropy, reduction="none", label_smoothing=settings.label_smoothing
        )
        self.per_epoch = batches.count
        self.total = max(1, settings.epochs * self.per_epoch)
        groups = parameter_groups(self.model, recipe.optimizer, data.dataset.info().num_classes)
        optimizer = recipe.optimizer.build(groups)
        self.optimizer = returned("optimizer.build", optimizer, torch.optim.Optimizer)
        self.max_gradient_norm = settings.clip_gradient
        self.l1, self.weights = settings.l1, trained_weights(self.model)
        skips = settings.on_nonfinite is OnNonFinite.skip
        self.skipping = SkippingStep(self.forward, self.optimizer) if skips else None
        scheduler = recipe.schedule.build(self.optimizer, self.total)
        returned("schedule.build", scheduler, Stepping)  # type: ignore[type-abstract]
        self.scheduler = scheduler
        # Counted here, since a schedule of the user's own need not count.
        self.batches = 0
        self.passes = Passes()
        self.weight_perturbation = recipe.weight_perturbation
        self.average = Average(self.model, recipe.averaging)
        self.randomness = RngState(self.model, seed, ready.device)
        self.streams = self.randomness.streams

    @property
    def progress(self) -> float:
        """Share of the training that is done, from 0 to 1."""
        return self.batches / self.total

    @property
    def lr(self) -> float:
        """The learning rate that the schedule sets for the next step."""
        return float(self.scheduler.get_last_lr()[0])

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, except the weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "batches": self.batches,
            "average": self.average.state_dict(),
            "random_states": self.randomness.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; the model already has its weights."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.batches = state["batches"]
        self.average.load_state_dict(state["average"])
        self.randomness.load_state_dict(state["random_states"])

    def train_batch(
        self, defense: Defense, batch: Batch, history: TrainingHistory
    ) -> list[Objective]:
        """Train on one batch: take an optimiser step, or one for each replay of `defense`.

        Parameters
        ----------
        defense
            The defense, as the curriculum has scheduled it for this batch.
        batch
            The batch, on the device of the model.
        history
            Has the size of a micro-batch that fits into memory, and a factor for the learning rate.

        Returns
        -------
        The objective of each step, without its graph. The loss is NaN if only the gradient was
        non-finite.
        """
        x = augment(batch.x, self.dataset.crop, self.dataset.flip, self.streams["augmentation"])
        microbatches = self._microbatches(x, batch.y, history.microbatch_size)
        objectives = []
        for replay in range(defense.replays if isinstance(defense, Replayed) else 1):
            if self.skipping is not None:
                self.skipping.keep_buffers()
            self.optimizer.zero_grad(set_to_none=True)
            parts = []
            for micro in microbatches:
                with self.ready.autocast(), images_are_valid():
                    if replay == 0:
                        micro.found = defense.inner(
                            micro.model, micro.x, micro.y, generator=self.streams["attack"]
                        )
                    objective = defense.outer(
                        micro.model, micro.x, micro.found, micro.y, loss=self.loss
                    )
                self._backward(objective.loss, micro.share, batch)
                parts.append(detached(objective, micro.share))
            ddp.refuse_unused(self.forward)
            self._perturb_weights(defense, microbatches, batch)
            whole = combined(parts)
            gradient_norm = clip_gradient(self.forward, self.max_gradient_norm)
            finite = whole.loss.isfinite() & gradient_norm.isfinite()
            with scaled_lr(self.optimizer, history.lr_factor):
                if self.skipping is None:
                    self.optimizer.step()
                else:
                    self.skipping.step_if(finite)
            objectives.append(_marked(whole, gradient_norm))
            if isinstance(defense, Replayed):
                for micro in microbatches:
                    micro.found = defense.advance(micro.x, micro.found)
        self.scheduler.step()
        self.batches += 1
        self.average.update(self.progress, ends_epoch=self.batches % self.per_epoch == 0)
        return objectives

    def train_batch_within_memory(
        self, defense: Defense, batch: Batch, history: TrainingHistory
    ) -> list[Objective]:
        """Call `train_batch`, and again with smaller micro-batches each time memory runs out.

        The size that fits is kept in `history`.

        Raises
        ------
        InputError
            If even the smallest micro-batch does not fit, or if the batch cannot be split.
        """
        while True:
            random_states, before = self.randomness.state_dict(), self.batches
            try:
                with self.passes.counting(self.forward):
                    return self.train_batch(defense, batch, history)
            except RuntimeError as error:
                # After the steps of the batch there is nothing left to split.
                if not is_out_of_memory(error) or self.batches > before:
                    raise
                refuse_microbatches(len(batch.y), defense)
                size = halved_size(len(batch.y), history.microbatch_size, self.model)
                history.microbatch_size = size
                self.say(split_notice(size, self.model))
            # Outside the handler, since the exception keeps tensors alive.
            self.randomness.load_state_dict(random_states)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The outer loss of each image, (N,), averaged over the draws if an image has several."""
        draws = len(logits) // len(y)
        return self.cross_entropy(logits, y.repeat_interleave(draws)).view(-1, draws).mean(1)

    def _microbatches(self, x: Tensor, y: Tensor, size: int | None) -> list[Microbatch]:
        """The batch as a whole, or in parts of at most `size` images."""
        x = x.contiguous(memory_format=self.ready.memory_format)
        return [
            Microbatch(self._model_for_batch(), images, labels, len(labels) / len(y))
            for images, labels in split_batch(x, y, size, self.model)
        ]

    def _model_for_batch(self) -> nn.Module:
        """The model that a defense calls, with the same draws of noise in all passes if set."""
        if self.draws is None:
            return self.forward
        view = SameDraws(self.forward, self.draws)
        view.renew(self.streams["same draws"])
        return view

    def _backward(self, loss: Tensor, share: float, batch: Batch) -> None:
        """Add the gradient of a part's mean loss, and of the penalties of noise and weights."""
        loss = batch.weight * loss
        extra = penalty(self.model, Progress(batch.epoch, self.images))
        loss = loss if extra is None else loss + extra
        if self.l1 > 0:
            loss = loss + self.l1 * sum(weight.abs().sum() for weight in self.weights)
        (share * loss).backward()  # type: ignore[no-untyped-call]

    def _perturb_weights(
        self, defense: Defense, microbatches: Sequence[Microbatch], batch: Batch
    ) -> None:
        """Replace the gradient by that at perturbed weights, if weights are perturbed by now."""
        offsets = self.weight_perturbation.at(self.progress)
        if offsets is None:
            return
        with perturbed(self.forward, offsets):
            self.optimizer.zero_grad(set_to_none=True)
            for micro in microbatches:
                with self.ready.autocast():
                    objective = defense.outer(
                        micro.model, micro.x, reusable(micro.found), micro.y, loss=self.loss
                    )
                self._backward(objective.loss, micro.share, batch)
            ddp.refuse_unused(self.forward)


def _marked(objective: Objective, gradient_norm: Tensor) -> Objective:
    """`objective` with a loss of NaN if the loss is finite but its gradient is not."""
    loss = objective.loss
    kept = gradient_norm.isfinite() | ~loss.isfinite()
    return objective._replace(loss=torch.where(kept, loss, torch.nan))
