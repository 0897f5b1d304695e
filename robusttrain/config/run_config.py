"""A run, with every component built."""

import dataclasses
from enum import StrEnum

from robusttrain import ranges
from robusttrain.attacks import Attack
from robusttrain.data import Dataset
from robusttrain.defenses import Defense
from robusttrain.evaluation import Evaluation
from robusttrain.loggers import Logger
from robusttrain.models import Architecture
from robusttrain.noise import Noise
from robusttrain.optim.averaging import Averaging
from robusttrain.optim.optimizers import Optimizer
from robusttrain.optim.schedules import Schedule
from robusttrain.optim.weight_perturbation import WeightPerturbation
from robusttrain.threat import Norm, Threat
from robusttrain.training.settings import Training


class Stage(StrEnum):
    """A part of a run."""

    train = "train"
    evaluate = "evaluate"


@dataclasses.dataclass
class Config:
    """A run, with every component built.

    Parameters
    ----------
    norm, eps
        The threat model that attacks, defenses and evaluation share unless told otherwise; `eps`
        in pixel units of [0, 1].
    seed
        From which every random stream is derived, 0 or more.
    device
        `auto` (CUDA where there is one), or a device of torch: cpu, cuda, cuda:1, mps.
    epochs, batch_size
        Passes over the training split, and images a step of each process.
    stages
        What to do, of train and evaluate.
    checkpoint
        A saved model to evaluate, or to train further from; somebody else's state dict, TorchScript
        file or exported program to evaluate.
    resume
        The directory of a run to go on with, which was stopped or killed, or `auto`: the newest
        unfinished one of this command. The command line takes the configuration from there.
    deterministic
        Whether torch uses algorithms only that give the same bits every time.
    keep_memory
        Whether the process keeps freed memory for its next tensors (glibc only; for speed).
    data_dir, download
        Where data sets lie, and whether missing ones are downloaded to there.
    trust
        Packages of yours whose classes may be built from a checkpoint's configuration.
    """

    dataset: Dataset
    model: Architecture
    noise: Noise
    attack: Attack
    defense: Defense
    optimizer: Optimizer
    schedule: Schedule
    weight_perturbation: WeightPerturbation
    averaging: Averaging
    training: Training
    evaluation: Evaluation
    logger: Logger
    norm: Norm = Norm.linf
    eps: float = 0.1
    seed: int = 0
    epochs: int = 20
    batch_size: int = 128
    device: str = "auto"
    stages: list[Stage] = dataclasses.field(default_factory=lambda: list(Stage))
    checkpoint: str | None = None
    resume: str | None = None
    deterministic: bool = False
    keep_memory: bool = True
    data_dir: str = "data"
    download: bool = True
    trust: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        ranges.at_least(0, eps=self.eps, seed=self.seed)
        ranges.require(bool(self.stages), "stages", [], "at least one of train, evaluate")
        ranges.require(
            Stage.train in self.stages or self.checkpoint is not None,
            "stages",
            "[evaluate]",
            "combined with checkpoint=..., or contain train",
        )

    @property
    def threat(self) -> Threat:
        """The threat model of the run."""
        return Threat(self.norm, self.eps)
