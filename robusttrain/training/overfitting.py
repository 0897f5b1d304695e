"""Signs of a training that goes wrong, and what is done about them."""

from dataclasses import dataclass
from typing import Any

import torch

from robusttrain.attacks import parts, states_threat, threats
from robusttrain.attacks.pgd import PGD
from robusttrain.data import Samples, Split
from robusttrain.threat import Threat
from robusttrain.training.settings import OnOverfit

# More than this below the best epoch so far, a share of images, is catastrophic overfitting.
FALL = 0.2
# So much above that under PGD-10, the accuracy under the training attack is one against it only.
LEAD = 0.5

# How often an epoch is begun again before training gives up.
MOST_ROLLBACKS = 3

# Images that PGD-10 is tried on after every epoch: at most, at least, and as a part of the split.
WATCHED_MOST, WATCHED_LEAST, WATCHED_PART = 128, 32, 20


class OverfittedError(Exception):
    """An epoch has overfitted catastrophically, and is to be done again."""


@dataclass
class TrainingHistory:
    """What training has been through, which no rollback undoes.

    Parameters
    ----------
    rate_share
        Multiplies the learning rate of the schedule.
    rollbacks, in_epoch
        How often an epoch was begun again, in all and in the present epoch.
    best_pgd
        The best accuracy under PGD-10 of an epoch so far.
    stopped
        Whether training has ended before its time.
    most
        Images that fit into memory together, where it is not a whole batch.
    """

    rate_share: float = 1.0
    rollbacks: int = 0
    in_epoch: int = 0
    best_pgd: float = 0.0
    stopped: bool = False
    most: int | None = None

    @property
    def may_roll_back(self) -> bool:
        """Whether there is another attempt."""
        return self.rollbacks < MOST_ROLLBACKS

    def roll_back(self) -> None:
        """Count a rollback."""
        self.rollbacks, self.in_epoch = self.rollbacks + 1, self.in_epoch + 1
        self.rate_share /= 2

    def judged(
        self, pgd: float | None, wanted: OnOverfit, own: float | None = None
    ) -> dict[str, Any]:
        """The columns of an epoch that ended with an accuracy of `pgd`, if it was measured.

        `own` is the accuracy under the training attack, where that has the whole ball of PGD-10.

        Raises
        ------
        OverfittedError
            If the epoch is to be done again.
        """
        overfit = pgd is not None and (_fell(pgd, self.best_pgd) or _led(pgd, own))
        if overfit and wanted is OnOverfit.rollback and self.may_roll_back:
            raise OverfittedError(f"catastrophic overfitting, {pgd:.1%} under PGD-10")
        columns = {"rollbacks": self.in_epoch, "overfit": overfit}
        self.stopped, self.in_epoch = overfit and wanted is not OnOverfit.warn, 0
        self.best_pgd = max(pgd or 0.0, self.best_pgd)
        return columns


def covers(defense: Any, threat: Threat) -> bool:
    """Whether the adversarial images of `defense` may lie anywhere in the ball that `probe` has."""
    stated = threats(defense)
    return bool(stated) and states_threat(defense) and all(own.covers(threat) for own in stated)


def probe(threat: Threat) -> PGD:
    """The attack that tells catastrophic overfitting from training that goes well."""
    return PGD(norm=threat.norm, eps=threat.eps, steps=10)


def watched_images(train: Samples, defense: Any, eps: float) -> Split:
    """The first images of a training split, for `probe` after every epoch: up to 128.

    They are a twentieth of a small split, and 32 at least. That costs about 20 passes of each: next
    to an epoch of one-step adversarial training, with 4 passes of every image, a quarter of its
    time on a small split and 1 % on 60,000 images; next to PGD-10 a fifth of that. It is none where
    nothing is attacked: a training that does not look for adversarial images may fall at will.
    """
    size = min(WATCHED_MOST, max(WATCHED_LEAST, train.size // WATCHED_PART))
    if eps == 0 or not _attacks(defense):
        size = 0
    return train.take(torch.arange(min(size, train.size))).loaded()


def _attacks(defense: object) -> bool:
    """Whether a defense looks for adversarial images, as an attack that does not say may do."""
    unknown = len(parts(defense)) > 1 and not states_threat(defense)
    return unknown or bool(threats(defense))


def _fell(pgd: float, best: float) -> bool:
    return pgd < best - FALL


def _led(pgd: float, own: float | None) -> bool:
    return own is not None and own - pgd > LEAD
