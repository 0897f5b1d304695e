"""A small problem in float64, its softmax by hand, and an attack that is fixed beforehand."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from robusttrain.attacks import Loss, Traits, cross_entropy
from robusttrain.attacks.model_view import Mode
from robusttrain.defenses import Defense, Objective, Unsupervised

Array = NDArray[np.float64]
CLASSES, SHAPE, COUNT = 4, (1, 2, 3), 6


def network(seed: int = 0) -> nn.Sequential:
    """A smooth network in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Flatten(1), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES)
        return nn.Sequential(*layers).double()


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    x = torch.rand(COUNT, *SHAPE, generator=generator(seed), dtype=torch.float64)
    return x, torch.arange(COUNT) % CLASSES


def generator(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Fixed:
    """An attack whose images are known; it keeps the loss that it was told to climb."""

    def __init__(self, x_adv: Tensor, mode: Mode = Mode.eval) -> None:
        self.x_adv, self.traits = x_adv, Traits(mode=mode)
        self.loss: Any = None

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Tensor:
        self.loss = keys.get("loss")
        return self.x_adv


def asked(
    defense: Defense,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: Loss = cross_entropy,
    draws: torch.Generator | None = None,
) -> Objective:
    """What the defense descends for some images."""
    if isinstance(defense, Unsupervised):
        defense = defense.with_original(model, CLASSES)
    found = defense.inner(model, x, y, generator=draws or generator())
    return defense.outer(model, x, found, y, loss=loss)


def objective_of(defense: Defense, model: nn.Module | None = None) -> Objective:
    """What the defense descends for the problem."""
    return asked(defense, network() if model is None else model, *batch())


def logits(x: Tensor, seed: int = 0) -> Array:
    """W2 tanh(W1 x + b1) + b2 of `network`, in NumPy."""
    w1, b1, w2, b2 = (p.detach().numpy() for p in network(seed).parameters())
    return np.asarray(np.tanh(x.flatten(1).numpy() @ w1.T + b1) @ w2.T + b2)


def softmax(values: Array) -> Array:
    p = np.exp(values)
    return np.asarray(p / p.sum(1, keepdims=True))


def gradients_are_right(defense: Defense) -> bool:
    """Finite differences of the objective over every parameter."""
    model = network()
    names = [name for name, _ in model.named_parameters()]

    class At(nn.Module):
        """The model at other weights."""

        def __init__(self, *values: Tensor) -> None:
            super().__init__()
            self.values = dict(zip(names, values, strict=True))

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, functional_call(model, self.values, x))

    def loss(*values: Tensor) -> Tensor:
        return objective_of(defense, At(*values)).loss

    values = tuple(p.detach().clone().requires_grad_() for p in model.parameters())
    check: Callable[..., bool] = torch.autograd.gradcheck
    return check(loss, values)


def worst_logits(eps: float, x: Tensor | None = None) -> Array:
    """sup of z_k - z_y over a box around `x`, by the signs of weights, for `network`, in NumPy."""
    images, y = batch()
    centre = (images if x is None else x).flatten(1).numpy()
    w1, b1, w2, b2 = (p.detach().numpy() for p in network().parameters())
    low, high = (np.clip(centre + sign * eps, 0, 1) for sign in (-1, 1))
    rise, fall = np.maximum(w1, 0).T, np.minimum(w1, 0).T
    below, above = np.tanh(low @ rise + high @ fall + b1), np.tanh(high @ rise + low @ fall + b1)
    rows = []
    for label, low1, high1 in zip(y.tolist(), below, above, strict=True):
        apart = w2 - w2[label]
        rows.append(np.maximum(apart, 0) @ high1 + np.minimum(apart, 0) @ low1 + b2 - b2[label])
    return np.asarray(rows)


def cross_entropies(values: Array) -> Array:
    """The cross-entropy of each image of `batch` at logits `values`, in NumPy."""
    return np.asarray(-np.log(softmax(values)[np.arange(len(values)), batch()[1].numpy()]))
