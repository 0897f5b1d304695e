"""What an attack climbs: losses of the logits, for one label or for a label and a target."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Self

import torch
from torch import Tensor

from robusttrain import ranges
from robusttrain.attacks.base import BallAttack, Label, Surrogate, cross_entropy

# Keeps the ratio of the DLR loss finite where all logits are equal.
TINY = 1e-12

CLASSES_OF_DLR, CLASSES_OF_TARGETED_DLR = 3, 4

TargetedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (N, K), labels (N,), targets (N,)) -> the loss of each image, (N,)."""


class Objective(StrEnum):
    """What an attack maximises.

    `loss` is what the caller asks for, cross-entropy in evaluation; `margin` is the lead of the
    best other class over the label (Carlini and Wagner 2017, f_6); `dlr` is that lead relative to
    the spread of the logits, so that their scale does not matter (Croce and Hein 2020).
    """

    loss = "loss"
    margin = "margin"
    dlr = "dlr"


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{i != y} z_i - z_y of each image, (N,): positive where it is misclassified."""
    others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return others - _entry(logits, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """-(z_y - max_{i != y} z_i) / (z_pi1 - z_pi3), from 3 classes on (Croce and Hein 2020, eq. 6).

    pi orders the logits from the largest to the smallest.
    """
    ordered = logits.topk(3, dim=1).values
    return margin(logits, y) / (ordered[:, 0] - ordered[:, 2] + TINY)


def targeted_margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """z_t - z_y of each image, (N,)."""
    return _entry(logits, target) - _entry(logits, y)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """-(z_y - z_t) / (z_pi1 - (z_pi3 + z_pi4) / 2), 4 classes or more (Croce and Hein, eq. 7)."""
    ordered = logits.topk(4, dim=1).values
    spread = ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2
    return targeted_margin(logits, y, target) / (spread + TINY)


def remaining(surrogate: Surrogate, x_adv: Tensor) -> Tensor:
    """The margin of the label that is left at `x_adv`, relative as in the DLR loss, (N,).

    One forward pass. With fewer than 3 classes, and for an attack that leads to its label, there is
    no such figure, and it is 0.
    """
    _, logits = surrogate.score(x_adv)
    if surrogate.targeted or logits.shape[1] < CLASSES_OF_DLR:
        return torch.zeros_like(logits[:, 0])
    return -dlr(logits, surrogate.labels)


def _entry(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None]).squeeze(1)


@dataclass
class Aimed(Surrogate):
    """A surrogate that leads from the label towards a target class; any other class is success.

    Parameters
    ----------
    targets
        The class to reach for each image, (N,).
    targeted_loss
        Loss of logits, labels and targets.
    """

    targets: Tensor
    targeted_loss: TargetedLoss

    def take(self, rows: Tensor | slice) -> Self:
        """The same function for some of the images."""
        return replace(self, labels=self.labels[rows], targets=self.targets[rows])

    def value(self, logits: Tensor) -> Tensor:
        """What the attack maximises, shape (N,)."""
        return self.targeted_loss(logits, self.labels, self.targets)


def aims(
    surrogate: Surrogate, x: Tensor, targets: int | None, objective: Objective
) -> list[Surrogate]:
    """`surrogate` with another objective, or a surrogate for each of the best-ranked targets.

    Targets are the classes with the largest logits at `x` but for the label, and cost one forward
    pass; the given loss of a target is what the caller's loss says of it, with the sign turned.
    """
    if targets is None:
        untargeted = {Objective.loss: surrogate.loss, Objective.margin: margin, Objective.dlr: dlr}
        return [replace(surrogate, loss=untargeted[objective])]
    losses: dict[Objective, TargetedLoss] = {
        Objective.loss: lambda logits, y, target: -surrogate.loss(logits, target),
        Objective.margin: targeted_margin,
        Objective.dlr: targeted_dlr,
    }
    _, logits = surrogate.score(x)
    others = logits.scatter(1, surrogate.labels[:, None], -torch.inf)
    ranked = others.topk(targets, dim=1).indices
    return [
        Aimed(surrogate.model, surrogate.labels, surrogate.loss, False, target, losses[objective])
        for target in ranked.unbind(1)
    ]


@dataclass
class TargetingAttack(BallAttack):
    """Base of the attacks that can aim at several classes, one after the other.

    Parameters
    ----------
    targets
        How many classes to aim at, in the order of their logits at the clean image; where not
        given, the attack just leads away from the label.
    """

    targets: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets is not None:
            ranges.at_least(1, targets=self.targets)
            ranges.require(
                self.label is not Label.least_likely,
                "label",
                self.label,
                "given or predicted where targets are given",
            )

    def fitted(self, num_classes: int) -> Self:
        """The same attack, with no more targets than there are other classes."""
        if self.targets is None or self.targets < num_classes:
            return self
        return replace(self, targets=num_classes - 1)


@dataclass
class ObjectiveAttack(TargetingAttack):
    """Base of the attacks that can climb one of several objectives.

    Parameters
    ----------
    objective
        What to maximise: loss, margin or dlr.
    """

    objective: Objective = Objective.loss

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.one_of(list(Objective), objective=self.objective)
        self.objective = Objective(self.objective)

    def fitted(self, num_classes: int) -> Self:
        """The same attack, with the margin where there are too few classes for the DLR loss."""
        needed = CLASSES_OF_DLR if self.targets is None else CLASSES_OF_TARGETED_DLR
        fitted = super().fitted(num_classes)
        if self.objective is Objective.dlr and num_classes < needed:
            return replace(fitted, objective=Objective.margin)
        return fitted

    def surrogates(self, surrogate: Surrogate, x: Tensor) -> list[Surrogate]:
        """What to climb: one surrogate, or one for each target."""
        if self.objective is not Objective.loss or self.targets is not None:
            ranges.require(
                surrogate.loss is cross_entropy,
                "objective",
                self.objective,
                "loss, and targets null, where the defense brings a loss of its own",
            )
        return aims(surrogate, x, self.targets, self.objective)
