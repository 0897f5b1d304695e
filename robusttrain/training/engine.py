"""One batch of a training, from its images to the weights after it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from robusttrain.data import augment, batch_count
from robusttrain.defenses import Defense, Objective, Replayed, reusable
from robusttrain.noise.draws import SameDraws, wanted_draws
from robusttrain.noise.layer import Progress, penalty
from robusttrain.optim.averaging import Average
from robusttrain.optim.weight_perturbation import perturbed
from robusttrain.runtime import distributed
from robusttrain.runtime.out_of_memory import is_out_of_memory
from robusttrain.training import ddp
from robusttrain.training.microbatches import (
    Microbatch,
    combined,
    divided,
    halved,
    notice,
    refuse_parts,
    without_graph,
)
from robusttrain.training.model_setup import ReadyModel
from robusttrain.training.optimizer_step import SkippingStep, clipped, groups, scaled_rate
from robusttrain.training.overfitting import TrainingHistory
from robusttrain.training.recipe import Recipe, TrainingData
from robusttrain.training.rng_state import RngState
from robusttrain.training.settings import OnNonFinite


class Batch(NamedTuple):
    """A batch of this process, before augmentation.

    Parameters
    ----------
    x, y
        Images (N, C, H, W) in [0, 1] and labels (N,).
    epoch
        From 1 on.
    weight
        Of its mean loss among those of all processes, of which the mean is descended.
    """

    x: Tensor
    y: Tensor
    epoch: int = 1
    weight: float = 1.0


class Engine:
    """A model that moves with every batch, and everything that its next step depends on.

    Parameters
    ----------
    ready
        The model, ready for training; it is trained in place.
    recipe
        Of which the defense is given with every batch, as the curriculum has it there.
    data
        On the device of the model.
    seed
        Of the run.
    say
        Tells the user something.
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
        self.dataset, self.images, self.say = data.dataset, data.train.size, say
        self.draws = wanted_draws(self.model)
        self.cross_entropy = partial(
            F.cross_entropy, reduction="none", label_smoothing=settings.label_smoothing
        )
        self.per_epoch = batch_count(self.images, settings.batch_size, distributed.size())
        self.total = max(1, settings.epochs * self.per_epoch)
        self.optimizer = recipe.optimizer.build(groups(self.model))
        self.clip_gradient = settings.clip_gradient
        skips = settings.on_nonfinite is OnNonFinite.skip
        self.skipping = SkippingStep(self.forward, self.optimizer) if skips else None
        self.scheduler = recipe.schedule.build(self.optimizer, self.total)
        # Not the schedule's count, which one of the user's own need not have.
        self.batches = 0
        self.weight_perturbation = recipe.weight_perturbation
        self.average = Average(self.model, recipe.averaging)
        self.randomness = RngState(self.model, seed, ready.device)
        self.streams = self.randomness.streams

    @property
    def progress(self) -> float:
        """Share of the training that is over."""
        return self.batches / self.total

    @property
    def lr(self) -> float:
        """The schedule's rate of the next step."""
        return float(self.scheduler.get_last_lr()[0])

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the weights that the next step depends on."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "batches": self.batches,
            "average": self.average.state_dict(),
            "random_states": self.randomness.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; the weights are the model's."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.batches = state["batches"]
        self.average.load_state_dict(state["average"])
        self.randomness.load_state_dict(state["random_states"])

    def train_batch(
        self, defense: Defense, batch: Batch, course: TrainingHistory
    ) -> list[Objective]:
        """Train on one batch: a step of the optimiser, or one for each replay of `defense`.

        Parameters
        ----------
        defense
            As the curriculum has it for this batch.
        batch
            On the device of the model.
        course
            Says how many images fit into memory, and what the learning rate is multiplied by.

        Returns
        -------
        The objective of each step, without its graph. Its loss is NaN where only the gradient was
        not finite.
        """
        x = augment(batch.x, self.dataset.crop, self.dataset.flip, self.streams["augmentation"])
        microbatches = self._microbatches(x, batch.y, course.most)
        descended = []
        for replay in range(defense.replays if isinstance(defense, Replayed) else 1):
            if self.skipping is not None:
                self.skipping.keep_buffers()
            self.optimizer.zero_grad(set_to_none=True)
            parts = []
            for micro in microbatches:
                with self.ready.autocast():
                    if replay == 0:
                        micro.found = defense.inner(
                            micro.model, micro.x, micro.y, generator=self.streams["attack"]
                        )
                    objective = defense.outer(
                        micro.model, micro.x, micro.found, micro.y, loss=self.loss
                    )
                self._backward(objective.loss, micro.share, batch)
                parts.append(without_graph(objective, micro.share))
            ddp.refuse_unused(self.forward)
            self._perturb_weights(defense, microbatches, batch)
            whole = combined(parts)
            gradient_norm = clipped(self.forward, self.clip_gradient)
            finite = whole.loss.isfinite() & gradient_norm.isfinite()
            with scaled_rate(self.optimizer, course.rate_share):
                if self.skipping is None:
                    self.optimizer.step()
                else:
                    self.skipping.step_if(finite)
            descended.append(_marked(whole, gradient_norm))
            if isinstance(defense, Replayed):
                for micro in microbatches:
                    micro.found = defense.advance(micro.x, micro.found)
        self.scheduler.step()
        self.batches += 1
        self.average.update(self.progress, epoch_ends=self.batches % self.per_epoch == 0)
        return descended

    def train_batch_within_memory(
        self, defense: Defense, batch: Batch, course: TrainingHistory
    ) -> list[Objective]:
        """`train_batch`, once more in smaller parts each time that memory runs out.

        `course` learns how many images fit into memory.

        Raises
        ------
        InputError
            If not even the smallest part fits, or if the batch cannot be computed in parts.
        """
        while True:
            random_states, before = self.randomness.state_dict(), self.batches
            try:
                return self.train_batch(defense, batch, course)
            except RuntimeError as error:
                # Behind the steps of the batch there is nothing left to compute in parts.
                if not is_out_of_memory(error) or self.batches > before:
                    raise
                refuse_parts(len(batch.y), defense)
                course.most = halved(len(batch.y), course.most, self.model)
                self.say(notice(course.most, self.model))
            # Behind the exception, which holds on to memory.
            self.randomness.load_state_dict(random_states)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The outer loss of each image, (N,), on average over its draws where there are several."""
        draws = len(logits) // len(y)
        return self.cross_entropy(logits, y.repeat_interleave(draws)).view(-1, draws).mean(1)

    def _microbatches(self, x: Tensor, y: Tensor, most: int | None) -> list[Microbatch]:
        """The batch as a whole, or in parts of `most` images."""
        x = x.contiguous(memory_format=self.ready.memory_format)
        return [
            Microbatch(self._view(), images, labels, len(labels) / len(y))
            for images, labels in divided(x, y, most, self.model)
        ]

    def _view(self) -> nn.Module:
        """The model as a defense gets it for some images."""
        if self.draws is None:
            return self.forward
        view = SameDraws(self.forward, self.draws)
        view.renew(self.streams["same draws"])
        return view

    def _backward(self, loss: Tensor, share: float, batch: Batch) -> None:
        """Add the gradient of a part's mean loss and of the penalty of the noise."""
        loss = batch.weight * loss
        extra = penalty(self.model, Progress(batch.epoch, self.images))
        loss = loss if extra is None else loss + extra
        (share * loss).backward()  # type: ignore[no-untyped-call]

    def _perturb_weights(
        self, defense: Defense, microbatches: Sequence[Microbatch], batch: Batch
    ) -> None:
        """Replace the gradient by that at perturbed weights, if there are such at this time."""
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
    """`objective` with a loss of NaN, where it is finite and its gradient is not."""
    loss = objective.loss
    kept = gradient_norm.isfinite() | ~loss.isfinite()
    return objective._replace(loss=torch.where(kept, loss, torch.nan))
