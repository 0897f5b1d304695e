"""What an attack climbs: losses of the logits, for one label or for a label and a target."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Self

import torch
from torch import Tensor

from robusttrain import ranges
from robusttrain.attacks.attack_loss import AttackLoss, Label, cross_entropy
from robusttrain.threat.balls import TINY

CLASSES_OF_DLR, CLASSES_OF_TARGETED_DLR = 3, 4

TargetedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (N, K), labels (N,), targets (N,)) -> the loss of each image, (N,)."""


class AttackObjective(StrEnum):
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


def remaining(surrogate: AttackLoss, x_adv: Tensor) -> Tensor:
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
class TowardsTarget(AttackLoss):
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


def targeted_losses(
    surrogate: AttackLoss, x: Tensor, targets: int | None, objective: AttackObjective
) -> list[AttackLoss]:
    """`surrogate` with another objective, or a surrogate for each of the best-ranked targets.

    Targets are the classes with the largest logits at `x` but for the label, and cost one forward
    pass. The given loss of a target is the negative of the caller's loss with it as the label.
    """
    if targets is None:
        untargeted = {
            AttackObjective.loss: surrogate.loss,
            AttackObjective.margin: margin,
            AttackObjective.dlr: dlr,
        }
        return [replace(surrogate, loss=untargeted[objective])]
    losses: dict[AttackObjective, TargetedLoss] = {
        AttackObjective.loss: lambda logits, y, target: -surrogate.loss(logits, target),
        AttackObjective.margin: targeted_margin,
        AttackObjective.dlr: targeted_dlr,
    }
    _, logits = surrogate.score(x)
    others = logits.scatter(1, surrogate.labels[:, None], -torch.inf)
    ranked = others.topk(targets, dim=1).indices
    return [
        TowardsTarget(
            surrogate.model, surrogate.labels, surrogate.loss, False, target, losses[objective]
        )
        for target in ranked.unbind(1)
    ]


def climbed(
    surrogate: AttackLoss, x: Tensor, targets: int | None, objective: AttackObjective
) -> list[AttackLoss]:
    """As `targeted_losses`, for an attack that climbs the caller's loss where nothing else is set.

    Raises
    ------
    InputError
        If an objective or targets are set and the caller has a loss of its own.
    """
    if has_own_objective(objective, targets):
        allowed = "loss, and targets null, where the defense brings a loss of its own"
        ranges.require(surrogate.loss is cross_entropy, "objective", objective, allowed)
    return targeted_losses(surrogate, x, targets, objective)


def has_own_objective(objective: AttackObjective, targets: int | None) -> bool:
    """Whether an attack climbs something else than the loss that it is called with."""
    return objective is not AttackObjective.loss or targets is not None


def check_targets(targets: int | None, label: Label) -> None:
    """Raise `InputError` unless there may be so many targets, 1 or more, beside such a label."""
    if targets is not None:
        ranges.at_least(1, targets=targets)
        allowed = "given or predicted where targets are given"
        ranges.require(label is not Label.least_likely, "label", label, allowed)


def checked_objective(objective: str) -> AttackObjective:
    """The objective that a word, or itself, stands for; `InputError` if there is none."""
    ranges.one_of(list(AttackObjective), objective=objective)
    return AttackObjective(objective)


def fitted_targets(targets: int | None, num_classes: int) -> int | None:
    """No more targets than there are other classes."""
    return None if targets is None else min(targets, num_classes - 1)


def fitted_objective(
    objective: AttackObjective, targets: int | None, num_classes: int
) -> AttackObjective:
    """The margin where there are too few classes for the DLR loss."""
    needed = CLASSES_OF_DLR if targets is None else CLASSES_OF_TARGETED_DLR
    too_few = objective is AttackObjective.dlr and num_classes < needed
    return AttackObjective.margin if too_few else objective
