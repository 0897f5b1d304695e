"""What all planted models have in common."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

# How far a pixel, in bytes, may be from a whole number.
ON_GRID = 1e-3


class Masked(nn.Module):
    """A network that is not robust behind something that hides it.

    `random` says that its prediction is a vote over draws, in which case `suite` is `eot`.
    """

    random = False
    suite: str | None = None

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def views(self) -> list[nn.Module]:
        """What an attacker who knows the model differentiates instead of it."""
        return [self.network]


class Random(Masked):
    """A planted model that draws whenever it predicts."""

    random = True
    suite = "eot"


class Composed(nn.Module):
    """`network` of a change of the images."""

    def __init__(self, change: Callable[[Tensor], Tensor], network: nn.Module) -> None:
        super().__init__()
        self.change, self.network = change, network

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K)."""
        logits: Tensor = self.network(self.change(x))
        return logits


def straight_through(changed: Tensor, x: Tensor) -> Tensor:
    """`changed` with the gradient of `x` (Bengio et al. 2013; BPDA, Athalye et al. 2018)."""
    return x + (changed - x).detach()


def without_gradient(outputs: Tensor, x: Tensor) -> Tensor:
    """`outputs` (N, ...) that depend on images `x` with a gradient of zero."""
    nothing = 0 * x.flatten(1).sum(1)
    return outputs.detach() + nothing.view(-1, *[1] * (outputs.dim() - 1))


class Nearest(nn.Module):
    """The class of the nearest stored image, as sure logits without a gradient."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.images, self.labels = images.flatten(1), labels

    def distances(self, x: Tensor) -> Tensor:
        """Euclidean distances to all stored images, (N, M)."""
        return torch.cdist(x.flatten(1), self.images)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10): 10 for the class, 0 for the others."""
        label = self.labels[self.distances(x).argmin(1)]
        return without_gradient(10 * one_hot(label), x)


class SoftNearest(Nearest):
    """The same with a gradient: a class scores by its nearest stored image, softly."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10)."""
        score = -20 * self.distances(x)
        classes = [score[:, self.labels == label].logsumexp(1) for label in range(10)]
        return torch.stack(classes, 1)


def one_hot(label: Tensor, classes: int = 10) -> Tensor:
    """Floats (N, classes)."""
    return nn.functional.one_hot(label, classes).float()


def off_grid(x: Tensor) -> Tensor:
    """Which images have pixels that are no bytes, (N,)."""
    return ((x * 255 - (x * 255).round()).abs() > ON_GRID).flatten(1).any(1)
