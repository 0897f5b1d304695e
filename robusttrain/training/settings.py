"""The settings of a training that belong neither to its defense nor to its optimiser."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import cast

from robusttrain import ranges
from robusttrain.attacks import Attack, several_threats
from robusttrain.training.curriculum import Curriculum
from robusttrain.training.precision import Precision


class OnNonFinite(StrEnum):
    """What to do if an objective, or the l2 norm of its gradient, is non-finite.

    `stop` ends the training with a message; the files of earlier epochs stay. `skip` takes no step:
    weights, BatchNorm's statistics and the optimiser's moments keep their values, while the
    schedule, whose length is fixed, advances. `rollback` restarts the epoch from its first batch
    and halves the learning rate from there on; training stops at the fourth time.
    """

    stop = "stop"
    skip = "skip"
    rollback = "rollback"


class OnOverfit(StrEnum):
    """What to do about catastrophic overfitting (Wong, Rice and Kolter 2020, section 5.4).

    `warn` prints a warning that names the epoch. `stop` ends the training after this epoch.
    `rollback` trains the epoch again and halves the learning rate from there on; training stops at
    the fourth time.
    """

    warn = "warn"
    stop = "stop"
    rollback = "rollback"


class Keep(StrEnum):
    """The checkpoints that a finished run keeps.

    `best` keeps `best.pt`, the weights of the best epoch. `last` keeps `checkpoint.pt` as well,
    which has the weights of the last epoch and the state of the training.
    """

    best = "best"
    last = "last"


class BatchNorm(StrEnum):
    """The statistics that BatchNorm layers use while a model is trained.

    `train` normalises with the statistics of the batch, and updates the running ones. `frozen`
    normalises with the running statistics, and keeps them, in training and in its attack, whatever
    the attack's mode. The scales and shifts of the layers are parameters, which are trained or not
    as `training.trainable` says.
    """

    train = "train"
    frozen = "frozen"


# The last blocks of a model, as `training.trainable` names them.
LAST = re.compile(r"last:([1-9]\d*)")


@dataclass
class Training:
    """Length, batches, precision and safeguards of a training.

    Parameters
    ----------
    epochs
        Passes over the training split, 0 or more.
    batch_size
        Images per step and process, 1 or more.
    trainable
        The parameters that are trained; the others keep their values bit for bit. `all` of them,
        the `head` (the last layer), `last:N` for the head and the N blocks before it, or a pattern
        such as `layer4.*` with the wildcards `*`, `?` and `[...]` that whole names of parameters
        match; or a list of these. Parameters of noise are always trained. BatchNorm in frozen
        blocks still updates its statistics unless `batch_norm` is `frozen`.
    batch_norm
        The statistics that BatchNorm layers use in training and in its attack: those of the batch
        (`train`), or their running ones, which then stay as they are (`frozen`).
    label_smoothing
        Share of the target that is spread over all classes, from 0 to below 1; in the outer loss
        only.
    clip_gradient
        Largest l2 norm of the gradient of all parameters together. No clipping if not given.
    l1
        Weight of the sum of the absolute weights in the outer loss, 0 or more; of all trained
        parameters with two or more axes, apart from those of normalisation layers and of noise. The
        loss that is displayed does not contain it.
    precision
        bf16 autocast, or float32. `auto` takes bf16 on devices that have instructions for it: CUDA
        from compute capability 8.0 on, CPUs with AVX512-BF16 or AMX.
    channels_last
        Whether images and weights are stored with the channels innermost, which is the layout of
        fast convolutions.
    compile
        Whether to train with `torch.compile`.
    sync_batchnorm
        Whether BatchNorm layers use the statistics of the images of all processes, if several train
        together, instead of those of each process.
    curriculum
        Schedule of the training attack over the epochs.
    validation_attack
        The attack whose accuracy on the validation split chooses `best.pt`. If training is for
        several threat models, it searches each of them, and what all leave standing counts.
    checkpoint_minutes
        Minutes, above 0, between writes of `checkpoint.pt` within an epoch.
    keep
        The checkpoints that stay when the run has ended.
    on_nonfinite
        What to do if a loss or its gradient is non-finite.
    on_overfit
        What to do about catastrophic overfitting: after an epoch of adversarial training, accuracy
        on training images under PGD-10 is more than 20 points below its best so far, or more than
        50 points below the accuracy under the training attack at the same radius.
    """

    epochs: int = 20
    batch_size: int = 128
    trainable: str | Sequence[str] = "all"
    batch_norm: BatchNorm = BatchNorm.train
    label_smoothing: float = 0.0
    clip_gradient: float | None = None
    l1: float = 0.0
    precision: Precision = Precision.auto
    channels_last: bool = True
    compile: bool = False
    sync_batchnorm: bool = False
    curriculum: Curriculum = field(default_factory=Curriculum)
    validation_attack: Attack | None = None
    checkpoint_minutes: float = 10.0
    keep: Keep = Keep.best
    on_nonfinite: OnNonFinite = OnNonFinite.stop
    on_overfit: OnOverfit = OnOverfit.warn

    def __post_init__(self) -> None:
        ranges.at_least(0, epochs=self.epochs)
        single = self.validation_attack is None or not several_threats(self.validation_attack)
        name, allowed = type(self.validation_attack).__name__, "an attack of one threat model"
        ranges.require(single, "validation_attack", name, allowed)
        ranges.count(batch_size=self.batch_size)
        _check_words(self.trainable)
        ranges.one_of(list(BatchNorm), batch_norm=self.batch_norm)
        ranges.above(0, checkpoint_minutes=self.checkpoint_minutes)
        ranges.require(
            0 <= self.label_smoothing < 1,
            "label_smoothing",
            self.label_smoothing,
            "from 0 to below 1",
        )
        if self.clip_gradient is not None:
            ranges.above(0, clip_gradient=self.clip_gradient)
        ranges.at_least(0, l1=self.l1)
        ranges.one_of(list(Keep), keep=self.keep)
        ranges.one_of(list(OnNonFinite), on_nonfinite=self.on_nonfinite)
        ranges.one_of(list(OnOverfit), on_overfit=self.on_overfit)
        # Strings are accepted as well; the code compares members by `is`.
        self.batch_norm = BatchNorm(self.batch_norm)
        self.keep = Keep(self.keep)
        self.on_nonfinite = OnNonFinite(self.on_nonfinite)
        self.on_overfit = OnOverfit(self.on_overfit)

    def unused(self) -> dict[str, str]:
        """`sync_batchnorm`, if there are no statistics of batches."""
        return {"sync_batchnorm": "batch_norm"} if self.batch_norm is BatchNorm.frozen else {}

    @property
    def rolls_back(self) -> bool:
        """Whether an epoch may have to be restarted."""
        return self.on_nonfinite is OnNonFinite.rollback or self.on_overfit is OnOverfit.rollback


def _check_words(trainable: object) -> None:
    """Refuse what names no parameters in any model."""
    words = [trainable] if isinstance(trainable, str) else trainable
    named = isinstance(words, Sequence) and all(isinstance(word, str) for word in words)
    allowed = "all, head, last:N with N from 1 on, a pattern of names, or a list of these"
    ranges.require(named and bool(words), "trainable", trainable, allowed)
    for word in cast("Sequence[str]", words):
        fits = bool(word) and (not word.startswith("last:") or LAST.fullmatch(word) is not None)
        ranges.require(fits, "trainable", word, allowed)
