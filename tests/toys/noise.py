"""A small network, its images, and the list of all mechanisms, for the tests of this folder."""

import io
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from robusttrain.data import Info
from robusttrain.data.synthetic import Synthetic
from robusttrain.defenses import Defense
from robusttrain.models.network import network as build_network
from robusttrain.noise import Noise
from robusttrain.noise.bayes import Bayes
from robusttrain.noise.dropout import Dropout
from robusttrain.noise.exponential import Exponential
from robusttrain.noise.gaussian import Gaussian
from robusttrain.noise.laplace import Laplace
from robusttrain.noise.layer import NoiseLayer, noise_layers
from robusttrain.noise.learn2perturb import Learn2Perturb
from robusttrain.noise.pni import PNIActivations, PNIWeights
from robusttrain.noise.rse import RSE
from robusttrain.noise.smoothing import Smoothing
from robusttrain.noise.stack import Stack
from robusttrain.noise.uniform import UniformNoise
from robusttrain.noise.weibull import Weibull
from robusttrain.optim.optimizers import SGD, Optimizer
from robusttrain.optim.schedules import Constant
from robusttrain.report.terminal import Terminal
from robusttrain.threat import Norm, Threat
from robusttrain.training.precision import Precision
from robusttrain.training.recipe import Recipe, TrainingData
from robusttrain.training.settings import Training
from robusttrain.training.trainer import Trainer

SHAPE, CLASSES = (1, 6, 6), 3

# Large enough for no two passes to agree by rounding.
SIZE = 0.3


def stacked(**switches: bool) -> Stack:
    return Stack({"input": Gaussian(SIZE, **switches), "weights": PNIWeights(**switches)})


# One row per mechanism, and one for each kind of place where it can be; with its switches.
MECHANISMS: dict[str, Callable[..., Noise]] = {
    "gaussian": lambda **switches: Gaussian(SIZE, **switches),
    "gaussian_first": lambda **switches: Gaussian(SIZE, at="first", **switches),
    "laplace": lambda **switches: Laplace(SIZE, **switches),
    "uniform": lambda **switches: UniformNoise(SIZE, **switches),
    "exponential": lambda **switches: Exponential(SIZE, **switches),
    "weibull": lambda **switches: Weibull(SIZE, **switches),
    "rse": RSE,
    "pni_w": PNIWeights,
    "pni_a": PNIActivations,
    "learn2perturb": Learn2Perturb,
    "dropout": lambda **switches: Dropout(0.5, **switches),
    "bayes": lambda **switches: Bayes(SIZE, **switches),
    "smoothing": lambda **switches: Smoothing(SIZE, **switches),
    "stack": stacked,
}

# Those whose size is learnt.
LEARNT = ["pni_w", "pni_a", "learn2perturb", "bayes", "stack"]


def network() -> nn.Sequential:
    """Two convolutions and a linear layer, with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Conv2d(4, 4, 3, stride=2),
            nn.Flatten(1),
            nn.Linear(16, CLASSES),
        )


def images(count: int = 5, seed: int = 1) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def ready(model: nn.Module, noise: Noise, seed: int = 7) -> nn.Module:
    """`model` with noise of which every parameter has its shape."""
    with torch.random.fork_rng(devices=[]):
        return build_network(model, noise, Info(SHAPE, CLASSES, ()), seed)  # type: ignore[arg-type]


def noisy(mechanism: str, seed: int = 7, *, train: bool = True, predict: bool = True) -> nn.Module:
    """A network with a mechanism of `MECHANISMS`."""
    return ready(network(), MECHANISMS[mechanism](train=train, predict=predict), seed)


def weights_of(model: nn.Module) -> Tensor:
    """All parameters, in one row."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def layer_of(model: nn.Module) -> NoiseLayer:
    """The one noise layer of a model."""
    (layer,) = noise_layers(model)
    return layer


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def continued(layer: NoiseLayer) -> torch.Generator:
    """A stream that goes on where that of `layer` is."""
    return torch.Generator().set_state(layer.rng_state_dict()["cpu"])


class Seen(nn.Module):
    """The identity, which keeps what comes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x.detach())
        return x


def quiet() -> Terminal:
    return Terminal(Console(file=io.StringIO()))


DATA = Synthetic(list(SHAPE), CLASSES, train_size=64, test_size=16, noise=0.3, validation=0)


def trainer(
    model: nn.Module, defense: Defense, *, optimizer: Optimizer | None = None, **settings: Any
) -> Trainer:
    """Training of `model` on 64 images in batches of 32, unless told otherwise."""
    split, _ = DATA.load()
    recipe = Recipe(
        defense, optimizer or SGD(0.1), Constant(),
        Training(**{"epochs": 1, "batch_size": 32, "precision": Precision.fp32, **settings}),
    )  # fmt: skip
    data = TrainingData(split, split.take(torch.arange(0)), DATA)
    return Trainer(model, recipe, data, Threat(Norm.linf, 0.1), seed=0, terminal=quiet())
