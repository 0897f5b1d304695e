"""Small trainings: data, networks, trainers, and defenses that misbehave."""

import io
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from robusttrain.attacks import Loss
from robusttrain.data import Extra, Split, hold_out
from robusttrain.data.synthetic import Synthetic
from robusttrain.defenses import Defense, Objective
from robusttrain.defenses.standard import Standard
from robusttrain.optim.averaging import Averaging, NoAveraging
from robusttrain.optim.optimizers import SGD, Optimizer
from robusttrain.optim.schedules import Constant, Schedule
from robusttrain.optim.weight_perturbation import NoPerturbation, WeightPerturbation
from robusttrain.report.terminal import Terminal
from robusttrain.threat import Norm, Threat
from robusttrain.training.precision import Precision
from robusttrain.training.recipe import Recipe, TrainingData
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
    extra: Extra | None = None,
    **settings: Any,
) -> Trainer:
    split, validation = hold_out(data.load()[0], data.validation, seed)
    recipe = Recipe(
        defense or Standard(), optimizer or SGD(0.1), schedule or Constant(),
        Training(**{"epochs": 2, "batch_size": 32, "precision": Precision.fp32, **settings}),
        weight_perturbation or NoPerturbation(), averaging or NoAveraging(),
    )  # fmt: skip
    seen = TrainingData(train or split, validation, data, extra)
    threat = Threat(Norm.linf, eps)
    return Trainer(model or network(), recipe, seen, threat, seed=seed, terminal=quiet())


def trained(*arguments: Any, **keys: Any) -> Tensor:
    """All parameters and statistics after training."""
    made = trainer(*arguments, **keys)
    list(made.epochs())
    return state_of(made.model)


def state_of(model: nn.Module) -> Tensor:
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


@dataclass
class Twice(Standard):
    """Standard training with two steps on every batch."""

    replays: int = 2

    def advance(self, x: Tensor, found: Tensor) -> Tensor:
        return found


@dataclass
class Diverging(Standard):
    """Standard training whose loss is multiplied by `factor` at one step."""

    at: int
    factor: float
    step: int = 0

    def outer(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, loss: Loss
    ) -> Objective:
        self.step += 1
        objective = super().outer(model, x, x_adv, y, loss=loss)
        factor = self.factor if self.step == self.at else 1.0
        return objective._replace(loss=objective.loss * factor)
