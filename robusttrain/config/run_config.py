"""The configuration of a run, with every component built."""

import dataclasses
from collections.abc import Mapping
from enum import StrEnum

from torch import nn

from robusttrain import ranges
from robusttrain.attacks import Attack
from robusttrain.checkpoints.initial_weights import InitialWeights
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
from robusttrain.report.page import Page
from robusttrain.report.verbosity import Verbosity
from robusttrain.threat import Norm, Threat, check_lengths, of_radii
from robusttrain.training.settings import Training

# torch's generators take no larger one.
LARGEST_SEED = 2**64 - 1


class Stage(StrEnum):
    """A part of a run."""

    train = "train"
    evaluate = "evaluate"


@dataclasses.dataclass
class Config:
    """The configuration of a run, with every component built.

    Parameters
    ----------
    norm
        Norm of the threat model. Attacks, defenses and evaluation use it unless they set their own.
    eps
        Radius of the threat model, in pixel units of [0, 1]. Attacks, defenses and evaluation use
        it unless they set their own.
    threats
        Several threat models: the radius of each norm, such as {linf: 0.3, l2: 2, l1: 10}. The
        suite and the audit search each of them. `norm` chooses the one that attacks and defenses
        for a single threat model train with: linf if not given, or the first. Its radius is `eps`,
        which is then left out.
    seed
        Seed that every random stream is derived from, below 2^64.
    epochs
        Passes over the training split.
    batch_size
        Images per step; of each process, if several train together.
    device
        `auto` (CUDA if available), or a device of torch: cpu, cuda, cuda:1, mps.
    stages
        What the run does. `evaluate` alone needs a `checkpoint` or `model.weights`.
    checkpoint
        A saved run, a checkpoint or a state dict to evaluate or to train further, or a TorchScript
        file or exported program to evaluate; or `pretrained:NAME`, a reference model.
    resume
        The directory of an interrupted run, which is resumed with its own configuration; or `auto`
        for the newest unfinished run of the same command.
    deterministic
        Whether torch uses deterministic algorithms only.
    keep_memory
        Whether the process keeps freed memory for its next tensors, which is faster (glibc only).
    data_dir
        Directory of the data sets.
    download
        Whether missing data sets are downloaded to `data_dir`.
    verbosity
        How much the run prints: `quiet` for warnings and the last line only, or `verbose` for
        details, such as the checks of the audit that pass. It is no part of what a run is: a run
        or a sweep may be resumed with another one.
    report
        Whether the run ends with a page for people: `html` writes `report.html`, and its figures to
        `plots/`; `none` does not. The jobs of a sweep have no pages of their own. As `verbosity`,
        it is no part of what a run is.
    trust
        Your own packages whose classes and functions the configuration in a checkpoint may call.
    initial_weights
        The keys of the section `model` for the weights that the model starts with.
    """

    dataset: Dataset
    model: Architecture | nn.Module
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
    threats: Mapping[str, float] = dataclasses.field(default_factory=dict)
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
    verbosity: Verbosity = Verbosity.normal
    report: Page = Page.html
    trust: list[str] = dataclasses.field(default_factory=list)
    initial_weights: InitialWeights = dataclasses.field(
        default_factory=InitialWeights, metadata={"section": "model"}
    )

    def __post_init__(self) -> None:
        check_lengths(self.norm, eps=self.eps)
        of_radii(self.threats)
        ranges.within(0, LARGEST_SEED, seed=self.seed)
        ranges.require(bool(self.stages), "stages", [], "at least one of train, evaluate")
        ranges.require(
            Stage.train in self.stages or self.is_given,
            "stages",
            "[evaluate]",
            "combined with checkpoint=... or model.weights=..., or contain train",
        )

    @property
    def is_given(self) -> bool:
        """Whether the weights of the model come from elsewhere than a random stream."""
        return self.checkpoint is not None or self.initial_weights.weights is not None

    @property
    def threat(self) -> Threat:
        """`norm` and `eps` as one value."""
        return Threat(self.norm, self.eps)

    @property
    def evaluated(self) -> tuple[Threat, ...]:
        """The threat models of the evaluation: those of `threats`, or that of `norm` and `eps`."""
        return of_radii(self.threats) or (self.threat,)
