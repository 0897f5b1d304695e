"""Small models and the list of all attacks, for the tests of this folder."""

import copy
import math
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robusttrain.attacks.apgd import APGD
from robusttrain.attacks.attack_loss import Label
from robusttrain.attacks.ball_attack import BallAttack
from robusttrain.attacks.carlini_wagner import CarliniWagner
from robusttrain.attacks.ddn import DDN
from robusttrain.attacks.decision_based import DecisionBased
from robusttrain.attacks.deepfool import DeepFool
from robusttrain.attacks.fab import FAB
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.fmn import FMN
from robusttrain.attacks.friendly import FriendlyPGD
from robusttrain.attacks.lbfgs import LBFGS
from robusttrain.attacks.mim import MIM
from robusttrain.attacks.pgd import PGD
from robusttrain.attacks.softmax_linearisation import SoftmaxLinearisation
from robusttrain.attacks.square import Square
from robusttrain.attacks.uniform import Uniform
from robusttrain.threat import Norm

Array = NDArray[np.float64]

# Options that are attacks of other libraries: the module, and an attack in l2.
EXTERNAL = {
    "advlib": ("adv_lib", "ddn"),
    "art": ("art", "FastGradientMethod"),
    "foolbox": ("foolbox", "L2PGD"),
    "torchattacks": ("torchattacks", "PGDL2"),
}


def is_missing(option: str) -> bool:
    """Whether an option of `attack` needs a library that is not installed."""
    return option in EXTERNAL and find_spec(EXTERNAL[option][0]) is None


Make = Callable[..., BallAttack]


def at_one_class(attack: Make, **keys: Any) -> BallAttack:
    """`attack` with one target, which it refuses for the label `least_likely`: there without."""
    return attack(targets=None if keys.get("label") is Label.least_likely else 1, **keys)


def in_l2(attack: Make, **keys: Any) -> BallAttack:
    """`attack`, which knows no other norm: a test of another one is left out."""
    if keys.get("norm", Norm.l2) is not Norm.l2:
        pytest.skip("this attack minimises the l2 norm")
    return attack(**keys)


# One row per behaviour of each attack that searches a ball.
ATTACKS: dict[str, Make] = {
    "fgsm": FGSM,
    "fgsm_rs": partial(FGSM, random_start=True),
    "pgd": partial(PGD, steps=3),
    "pgd_best": partial(PGD, steps=2, restarts=2, keep_best=True),
    "pgd_gaussian": partial(PGD, steps=3, start="gaussian"),
    "pgd_mixed": partial(PGD, steps=3, start="mixed"),
    "friendly": partial(FriendlyPGD, steps=3, tau=1),
    "lbfgs": partial(LBFGS, steps=2, rounds=2),
    "softmax_linearisation": SoftmaxLinearisation,
    "uniform": Uniform,
    "apgd": partial(APGD, steps=5),
    "apgd_t": partial(at_one_class, partial(APGD, steps=5, objective="margin")),
    "fab": partial(FAB, steps=4),
    "fab_t": partial(at_one_class, partial(FAB, steps=3, restarts=2, give_up=False)),
    "square": partial(Square, queries=8),
    "decision_based": partial(DecisionBased, queries=60, restarts=2),
    "mim": partial(MIM, steps=3),
    "mim_best": partial(MIM, steps=3, stop_early=True),
    "carlini_wagner": partial(in_l2, partial(CarliniWagner, steps=5, binary_steps=3)),
    "deepfool": partial(DeepFool, steps=3),
    "ddn": partial(in_l2, partial(DDN, steps=5)),
    "fmn": partial(FMN, steps=5),
}
RANDOM = [
    "fgsm_rs", "pgd", "pgd_best", "pgd_gaussian", "pgd_mixed", "friendly", "uniform", "apgd",
    "apgd_t", "square",
]  # fmt: skip
GRADIENT_FREE = ["uniform", "square", "decision_based"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> Any:
    """`build()` with the weights that `seed` gives; the global stream stays where it is."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def interior(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images with every pixel between 0.4 and 0.6."""
    return 0.4 + 0.2 * torch.rand(shape, generator=generator(seed), dtype=dtype)


def everywhere(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images with pixels all over the box, some of them exactly at its faces."""
    values = torch.rand(shape, generator=generator(seed), dtype=torch.float64)
    return (values * 1.4 - 0.2).clamp(0, 1).to(dtype)


class Affine(nn.Module):
    """logits = W x + b on the flattened pixels, in float64."""

    def __init__(self, classes: int, pixels: int, seed: int = 0) -> None:
        super().__init__()
        draw = generator(seed)
        self.weight = nn.Parameter(torch.randn(classes, pixels, generator=draw).double())
        self.bias = nn.Parameter(torch.randn(classes, generator=draw).double())

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


class OnFirstPixel(nn.Module):
    """Logits that are a function of t = (first pixel) - 1/2 alone."""

    def __init__(self, logits: Callable[[Tensor], list[Tensor]]) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.logits(x.flatten(1)[:, 0] - 0.5), 1)


def tanh_network(pixels: int, classes: int, seed: int = 0, gain: float = 3.0) -> nn.Module:
    """A smooth two-layer network in float64 with equal logits for the grey image."""

    def build() -> nn.Module:
        first, last = nn.Linear(pixels, 16), nn.Linear(16, classes)
        with torch.no_grad():
            for layer in (first, last):
                layer.weight.mul_(gain)
            first.bias.copy_(-first.weight.sum(1) / 2)
            last.bias.zero_()
        return nn.Sequential(nn.Flatten(1), first, nn.Tanh(), last).double()

    network: nn.Module = seeded(build, seed)
    return network


def batchnorm_network(channels: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A convolutional network in train mode, one of whose BatchNorms is frozen in eval mode."""
    return copy.deepcopy(_batchnorm_network(channels, dtype))


# To copy a network takes a fifth of the time that its building takes.
@cache
def _batchnorm_network(channels: int, dtype: torch.dtype) -> nn.Module:
    def build() -> nn.Module:
        network = nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Dropout(0.5),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(1),
            nn.Linear(4, 3),
        ).to(dtype)
        for norm in (network[1], network[4]):
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
        network[1].eval().requires_grad_(False)
        return network

    network: nn.Module = seeded(build)
    return network


def loss_gradient(network: nn.Module, x: Array, y: int) -> Array:
    """d/dx of the cross-entropy of W2 tanh(W1 x + b1) + b2, by hand."""
    w1, b1, w2, b2 = (parameter.detach().numpy() for parameter in network.parameters())
    hidden = np.tanh(w1 @ x + b1)
    logits = w2 @ hidden + b2
    p = np.exp(logits - logits.max())
    p /= p.sum()
    p[y] -= 1
    result: Array = w1.T @ ((1 - hidden**2) * (w2.T @ p))
    return result


def reference_step(norm: Norm, g: Array, z: Array) -> Array:
    if norm is Norm.linf:
        return np.sign(g)
    if norm is Norm.l2:
        return g / math.sqrt((g**2).sum())
    count = max(1, round(len(g) / 100))
    free = [i for i in np.argsort(-np.abs(g)) if (z[i] < 1 if g[i] > 0 else z[i] > 0)]
    step = np.zeros_like(g)
    step[free[:count]] = np.sign(g[free[:count]]) / count
    return step


def reference_projection(norm: Norm, z: Array, x: Array, eps: float) -> Array:
    delta = z - x
    if norm is Norm.linf:
        return np.clip(x + np.clip(delta, -eps, eps), 0, 1)
    if norm is Norm.l2:
        return np.clip(x + delta * min(1, eps / math.sqrt((delta**2).sum())), 0, 1)

    def soft(threshold: float) -> Array:
        return np.clip(x + np.sign(delta) * np.maximum(np.abs(delta) - threshold, 0), 0, 1)

    if np.abs(soft(0) - x).sum() <= eps:
        return soft(0)
    low, high = 0.0, float(np.abs(delta).max())
    for _ in range(100):
        middle = (low + high) / 2
        above = np.abs(soft(middle) - x).sum() > eps
        low, high = (middle, high) if above else (low, middle)
    return soft(high)


def misleading(t: Tensor) -> list[Tensor]:
    """Ten classes, 0 the right one: left of t = 0 class 1 wins, right of it none does.

    On the right nine rivals share the rest: the cross-entropy is higher there, but no rival wins.
    """
    right = -2 + 6 * t.clamp_min(0)
    return [0 * t, -1 + 5 * (-t).clamp_min(0), *[right] * 8]


def pixel_images(count: int) -> tuple[Tensor, Tensor]:
    """Grey images of one pixel, all of class 0."""
    return torch.full((count, 1, 1, 1), 0.5), torch.zeros(count, dtype=torch.int64)
