"""Small trainings: data, networks, trainers, and defenses that misbehave."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from robusttrain.data import Split, hold_out
from robusttrain.data.synthetic import Synthetic
from robusttrain.defenses import Defense, Objective
from robusttrain.defenses.standard import Standard
from robusttrain.optim.averaging import Averaging
from robusttrain.optim.optimizers import SGD, Optimizer
from robusttrain.optim.schedules import Constant, Schedule
from robusttrain.optim.weight_perturbation import WeightPerturbation
from robusttrain.report.terminal import Terminal
from robusttrain.threat import Norm
from robusttrain.training.precision import Precision
from robusttrain.training.settings import Training
from robusttrain.training.trainer import Trainer

DATA = Synthetic([1, 4, 4], 3, train_size=130, test_size=40, noise=0.3, validation=30)


EPS = 0.1


def quiet() -> Terminal:
    return Terminal(Console(file=io.StringIO()))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(1), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)
    )


def trainer(
    defense: Defense | None = None,
    *,
    model: nn.Module | None = None,
    train: Split | None = None,
    optimizer: Optimizer | None = None,
    schedule: Schedule | None = None,
    data: Synthetic = DATA,
    eps: float = EPS,
    seed: int = 0,
    weight_perturbation: WeightPerturbation | None = None,
    averaging: Averaging | None = None,
    **settings: Any,
) -> Trainer:
    split, validation = hold_out(data.load()[0], data.validation, seed)
    return Trainer(
        model or network(), defense or Standard(), optimizer or SGD(0.1), schedule or Constant(),
        Training(**{"epochs": 2, "batch_size": 32, "precision": Precision.fp32, **settings}),
        train=train or split, validation=validation, dataset=data,
        norm=Norm.linf, eps=eps, seed=seed, terminal=quiet(),
        weight_perturbation=weight_perturbation, averaging=averaging,
    )  # fmt: skip


def trained(*arguments: Any, **keys: Any) -> Tensor:
    """All parameters and statistics after training."""
    made = trainer(*arguments, **keys)
    list(made.epochs())
    return state_of(made.model)


def state_of(model: nn.Module) -> Tensor:
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


@dataclass
class Twice:
    """Yields two objectives for every batch."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Iterator[Objective]:
        for _ in range(2):
            yield from Standard()(model, x, y, **keys)


@dataclass
class Diverging:
    """Standard training whose loss is multiplied by `factor` at one step."""

    at: int
    factor: float
    step: int = 0

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Iterator[Objective]:
        self.step += 1
        for objective in Standard()(model, x, y, **keys):
            factor = self.factor if self.step == self.at else 1.0
            yield objective._replace(loss=objective.loss * factor)
