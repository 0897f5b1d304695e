"""Catastrophic overfitting: how it is detected, and when training is rolled back or stopped."""

from dataclasses import dataclass
from typing import Any

import torch

from robusttrain.attacks import parts, states_threat, threats
from robusttrain.attacks.pgd import PGD
from robusttrain.data import Samples, Split
from robusttrain.defenses import Unsupervised
from robusttrain.threat import Threat
from robusttrain.training.settings import OnOverfit

# An epoch has overfitted if its accuracy under PGD-10 is this far below that of the best epoch...
FALL = 0.2
# ...or this far below the accuracy under the training attack.
GAP = 0.5

# Rollbacks before training gives up.
MAX_ROLLBACKS = 3

# Images that PGD-10 attacks after every epoch: the split's size divided by `PROBE_PART`, within
# these limits.
MIN_PROBE_IMAGES, MAX_PROBE_IMAGES, PROBE_PART = 32, 128, 20


class OverfittedError(Exception):
    """An epoch has overfitted catastrophically and has to be trained again."""


@dataclass
class TrainingHistory:
    """The part of a training's state that no rollback undoes.

    Parameters
    ----------
    lr_factor
        Factor of the schedule's learning rate; each rollback halves it.
    rollbacks, rollbacks_in_epoch
        Rollbacks so far, in all and in the present epoch.
    best_pgd
        The best accuracy under PGD-10 at the end of an epoch so far.
    stopped
        Whether overfitting has ended the training early.
    microbatch_size
        Images that fit into memory together; None as long as whole batches do.
    """

    lr_factor: float = 1.0
    rollbacks: int = 0
    rollbacks_in_epoch: int = 0
    best_pgd: float = 0.0
    stopped: bool = False
    microbatch_size: int | None = None

    @property
    def may_roll_back(self) -> bool:
        """Whether there are fewer than `MAX_ROLLBACKS` rollbacks so far."""
        return self.rollbacks < MAX_ROLLBACKS

    def roll_back(self) -> None:
        """Count a rollback, and halve the learning rate."""
        self.rollbacks += 1
        self.rollbacks_in_epoch += 1
        self.lr_factor /= 2

    def end_epoch(
        self, pgd: float | None, on_overfit: OnOverfit, training: float | None = None
    ) -> dict[str, Any]:
        """Check an epoch for overfitting, and return its columns `rollbacks` and `overfit`.

        Parameters
        ----------
        pgd
            Accuracy under PGD-10, if it was measured.
        on_overfit
            What to do about overfitting.
        training
            Accuracy under the training attack, if its ball contains that of PGD-10.

        Raises
        ------
        OverfittedError
            If the epoch has to be trained again.
        """
        overfit = pgd is not None and (has_fallen(pgd, self.best_pgd) or _has_gap(pgd, training))
        if overfit and on_overfit is OnOverfit.rollback and self.may_roll_back:
            raise OverfittedError(f"catastrophic overfitting, {pgd:.1%} under PGD-10")
        columns = {"rollbacks": self.rollbacks_in_epoch, "overfit": overfit}
        self.stopped, self.rollbacks_in_epoch = overfit and on_overfit is not OnOverfit.warn, 0
        self.best_pgd = max(pgd or 0.0, self.best_pgd)
        return columns


def trains_on_ball(defense: Any, threat: Threat) -> bool:
    """Whether `defense` searches a ball that contains that of `threat`."""
    stated = threats(defense)
    return bool(stated) and states_threat(defense) and all(own.covers(threat) for own in stated)


def probe(threat: Threat) -> PGD:
    """PGD-10, the attack that detects catastrophic overfitting."""
    return PGD(norm=threat.norm, eps=threat.eps, steps=10)


def probe_images(train: Samples, defense: Any, eps: float) -> Split:
    """The first images of a training split, for `probe` to attack after every epoch.

    Their number is a twentieth of the split, at least 32 and at most 128. The attack costs about 20
    passes of each. An epoch of one-step adversarial training takes 4 passes of every image, so the
    attack adds a quarter to it on a small split, and 1 % on 60,000 images. It adds a fifth of that
    to an epoch of PGD-10. There are no such images if `defense` does not search for adversarial
    images or trains no head, since its accuracy under PGD-10 then says nothing about overfitting.
    """
    size = min(MAX_PROBE_IMAGES, max(MIN_PROBE_IMAGES, train.size // PROBE_PART))
    if eps == 0 or not searches(defense) or isinstance(defense, Unsupervised):
        size = 0
    return train.take(torch.arange(min(size, train.size))).loaded()


def has_fallen(pgd: float, best: float) -> bool:
    """Whether the accuracy `pgd` is more than `FALL` below the `best` one."""
    return pgd < best - FALL


def _has_gap(pgd: float, training: float | None) -> bool:
    return training is not None and training - pgd > GAP


def searches(defense: object) -> bool:
    """Whether a defense searches for adversarial images; assumed of an attack without a threat."""
    unknown = len(parts(defense)) > 1 and not states_threat(defense)
    return unknown or bool(threats(defense))
