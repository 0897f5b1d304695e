"""Signs of a training that goes wrong, and what is done about them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from robusttrain.attacks.pgd import PGD
from robusttrain.data import Samples, Split
from robusttrain.threat import Norm
from robusttrain.training.curriculum import has_radius
from robusttrain.training.metrics import Epoch

# More than this below the best epoch so far, a share of images, is catastrophic overfitting.
FALL = 0.2
# So much above that under PGD-10, the accuracy under the training attack is one against it only.
LEAD = 0.5
# Adversarial accuracy so much above the clean one is no luck any more.
LEAK = 0.02
# Up to so many times the share of one class, a training has learnt nothing.
STUCK = 1.2

# How often an epoch is begun again before training gives up.
MOST_ROLLBACKS = 3

# Images that PGD-10 is tried on after every epoch: at most, at least, and as a part of the split.
WATCHED_MOST, WATCHED_LEAST, WATCHED_PART = 128, 32, 20


class OnOverfit(StrEnum):
    """What is done about catastrophic overfitting (Wong, Rice and Kolter 2020, section 5.4).

    `warn` names the epoch, `stop` ends the training there, `rollback` trains the epoch once more
    from where it began, with half the learning rate from there on, and after three times stops.
    """

    warn = "warn"
    stop = "stop"
    rollback = "rollback"


class OverfittedError(Exception):
    """An epoch has overfitted catastrophically, and is to be done again."""


@dataclass
class Course:
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


def covers(defense: Any, norm: Norm, eps: float) -> bool:
    """Whether the adversarial images of `defense` may lie anywhere in the ball that `probe` has."""
    parts: list[Any] = [defense, getattr(defense, "attack", None)]
    owners = [part for part in parts if hasattr(part, "eps")]
    whole = [part.eps >= eps and getattr(part, "norm", norm) == norm for part in owners]
    return bool(owners) and all(whole)


def probe(norm: Norm, eps: float) -> PGD:
    """The attack that tells catastrophic overfitting from training that goes well."""
    return PGD(norm=norm, eps=eps, steps=10)


def watched(train: Samples, defense: Any, eps: float) -> Split:
    """The first images of a training split, for `probe` after every epoch: up to 128.

    They are a twentieth of a small split, and 32 at least. That costs about 20 passes of each: next
    to an epoch of one-step adversarial training, with 4 passes of every image, a quarter of its
    time on a small split and 1 % on 60,000 images; next to PGD-10 a fifth of that. It is none where
    nothing is attacked: a training that does not look for adversarial images may fall at will.
    """
    size = min(WATCHED_MOST, max(WATCHED_LEAST, train.size // WATCHED_PART))
    if eps == 0 or not has_radius(defense):
        size = 0
    return train.take(torch.arange(min(size, train.size))).loaded()


def remarks(epochs: Sequence[Epoch], num_classes: int, planned: int) -> Iterator[str]:
    """What there is to say about the last of `epochs`, of which so many are planned."""
    epoch = epochs[-1]
    if epoch.non_finite:
        yield (
            f"warning: {epoch.non_finite} steps of epoch {epoch.epoch} were skipped: "
            f"the loss or its gradient was not finite"
        )
    if epoch.overfit and not any(earlier.overfit for earlier in epochs[-2:-1]):
        yield (
            f"warning: catastrophic overfitting in epoch {epoch.epoch}: accuracy on training "
            f"images under PGD-10 {_decline(epochs)}"
        )
    leaks = [_leaks(each) for each in epochs]
    if leaks[-1] and not any(leaks[:-1]):
        yield (
            f"warning: label leaking in epoch {epoch.epoch}: {epoch.train_robust_accuracy:.1%} of "
            f"the adversarial images are right, and {epoch.train_clean_accuracy:.1%} of the clean "
            f"ones; attack.label=predicted does not show the attack the label"
        )
    known = [a for a in (epoch.train_clean_accuracy, epoch.train_robust_accuracy) if a is not None]
    # Not earlier: a schedule that warms up has learnt nothing at first.
    if epoch.epoch == (planned + 1) // 2 and max(known, default=1) < STUCK / num_classes:
        yield (
            f"warning: after epoch {epoch.epoch} training accuracy is {max(known):.1%}, that of a "
            f"guess among {num_classes} classes: the model is stuck; try a lower optimizer.lr, or "
            f"training.curriculum.eps_warmup=0.5 training.curriculum.smooth=true"
        )


def summary(epochs: Sequence[Epoch]) -> dict[str, Any]:
    """What went wrong in a training, for `manifest.json`."""
    return {
        "epochs": len(epochs),
        "non_finite": sum(epoch.non_finite for epoch in epochs),
        "rollbacks": sum(epoch.rollbacks for epoch in epochs),
        "overfit_epochs": [epoch.epoch for epoch in epochs if epoch.overfit],
    }


def _fell(pgd: float, best: float) -> bool:
    return pgd < best - FALL


def _led(pgd: float, own: float | None) -> bool:
    return own is not None and own - pgd > LEAD


def _decline(epochs: Sequence[Epoch]) -> str:
    """How the last of `epochs` has overfitted."""
    now = epochs[-1].train_pgd_accuracy or 0.0
    best = max(epoch.train_pgd_accuracy or 0.0 for epoch in epochs)
    if _fell(now, best):
        return f"fell from {best:.1%} to {now:.1%}"
    return f"is {now:.1%}, and {epochs[-1].train_robust_accuracy:.1%} under the training attack"


def _leaks(epoch: Epoch) -> bool:
    clean, robust = epoch.train_clean_accuracy, epoch.train_robust_accuracy
    return clean is not None and robust is not None and robust > clean + LEAK
