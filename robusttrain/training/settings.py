"""The settings of a training that are neither its defense's nor its optimiser's."""

from dataclasses import dataclass, field
from enum import StrEnum

from robusttrain import ranges
from robusttrain.attacks import Attack
from robusttrain.training.curriculum import Curriculum
from robusttrain.training.precision import Precision


class OnNonFinite(StrEnum):
    """What is done about an objective whose loss, or the l2 norm of whose gradient, is not finite.

    `stop` ends the training with a message, and what earlier epochs left stays. `skip` does not
    descend the objective: weights, BatchNorm's statistics and the optimiser's moments are what they
    were, while the schedule, whose length is fixed, goes on. `rollback` begins the epoch again from
    its first batch, with half the learning rate from there on; a fourth time training stops.
    """

    stop = "stop"
    skip = "skip"
    rollback = "rollback"


class OnOverfit(StrEnum):
    """What is done about catastrophic overfitting (Wong, Rice and Kolter 2020, section 5.4).

    `warn` names the epoch, `stop` ends the training there, `rollback` trains the epoch once more
    from where it began, with half the learning rate from there on, and after three times stops.
    """

    warn = "warn"
    stop = "stop"
    rollback = "rollback"


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
        training against adversarial images, falls by more than 20 points below its best, or is
        more than 50 points below that under the training attack at the same radius.
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
