"""The components of a training, and its data."""

from dataclasses import dataclass, field

from robusttrain import ranges
from robusttrain.data import Batches, Dataset, Extra, Samples
from robusttrain.defenses import Defense
from robusttrain.optim.averaging import Averaging, NoAveraging
from robusttrain.optim.optimizers import Optimizer
from robusttrain.optim.schedules import Schedule
from robusttrain.optim.weight_perturbation import NoPerturbation, WeightPerturbation
from robusttrain.runtime import distributed
from robusttrain.training.settings import Training


@dataclass(frozen=True)
class Recipe:
    """The components of a training, each an independent choice.

    Raises
    ------
    InputError
        If `defense` has no `inner` or no `outer`.
    """

    defense: Defense
    optimizer: Optimizer
    schedule: Schedule
    settings: Training = field(default_factory=Training)
    weight_perturbation: WeightPerturbation = field(default_factory=NoPerturbation)
    averaging: Averaging = field(default_factory=NoAveraging)

    def __post_init__(self) -> None:
        allowed = "one with the methods inner and outer of robusttrain.defenses.Defense"
        fits = isinstance(self.defense, Defense)
        ranges.require(fits, "defense", type(self.defense).__name__, allowed)


@dataclass(frozen=True)
class TrainingData:
    """The data of a training.

    Parameters
    ----------
    train, validation
        The splits, for use on the device of the model. The validation split may be empty.
    dataset
        The data set, which sets the augmentation.
    extra
        Images that each batch has a share of, for use on the same device.
    """

    train: Samples
    validation: Samples
    dataset: Dataset
    extra: Extra | None = None

    def batches(self, batch_size: int) -> Batches:
        """The batches of this process, with `batch_size` images each."""
        part, parts = distributed.rank(), distributed.size()
        return Batches(self.train, self.extra, batch_size, part, parts)
