"""Problems of a training, and its summary in the manifest."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from robusttrain.training.metrics import Epoch
from robusttrain.training.overfitting import has_fallen

# Adversarial training accuracy that exceeds the clean one by more than this is label leaking.
LEAK = 0.02


# A training whose accuracy is below this multiple of chance has learnt nothing.
STUCK = 1.2


class Finding(NamedTuple):
    """A problem of a training: its name, the epoch in which it was found, and a line about it."""

    problem: str
    epoch: int
    message: str


def findings(epochs: Sequence[Epoch], num_classes: int, planned: int) -> list[Finding]:
    """All problems of a training of `planned` epochs, in their order."""
    return [
        finding
        for number in range(1, len(epochs) + 1)
        for finding in findings_in_last(epochs[:number], num_classes, planned)
    ]


def findings_in_last(epochs: Sequence[Epoch], num_classes: int, planned: int) -> Iterator[Finding]:
    """What was found in the last of `epochs`, in a training of `planned` epochs."""
    epoch = epochs[-1]
    if epoch.non_finite:
        yield Finding(
            "skipped steps", epoch.epoch,
            f"{epoch.non_finite} steps of epoch {epoch.epoch} were skipped: the loss or its "
            f"gradient was not finite",
        )  # fmt: skip
    if epoch.overfit and not any(earlier.overfit for earlier in epochs[-2:-1]):
        yield Finding(
            "catastrophic overfitting", epoch.epoch,
            f"catastrophic overfitting in epoch {epoch.epoch}: accuracy on training images under "
            f"PGD-10 {_decline(epochs)}",
        )  # fmt: skip
    leaks = [_leaks(each) for each in epochs]
    if leaks[-1] and not any(leaks[:-1]):
        yield Finding(
            "label leaking", epoch.epoch,
            f"label leaking in epoch {epoch.epoch}: {epoch.train_robust_accuracy:.1%} of the "
            f"adversarial training images are classified correctly, but only "
            f"{epoch.train_clean_accuracy:.1%} of the clean ones; attack.label=predicted hides the "
            f"true label from the attack",
        )  # fmt: skip
    known = [a for a in (epoch.train_clean_accuracy, epoch.train_robust_accuracy) if a is not None]
    # Not earlier: during a warm-up of the learning rate a model may learn nothing.
    if epoch.epoch == (planned + 1) // 2 and max(known, default=1) < STUCK / num_classes:
        yield Finding(
            "stuck", epoch.epoch,
            f"after epoch {epoch.epoch} training accuracy is {max(known):.1%}, no better than a "
            f"guess among {num_classes} classes: the model is stuck; try a lower optimizer.lr, or "
            f"training.curriculum.eps_warmup=0.5 training.curriculum.per_batch=true",
        )  # fmt: skip


def summary(epochs: Sequence[Epoch]) -> dict[str, Any]:
    """Counts of the problems in a training, for `manifest.json`."""
    return {
        "epochs": len(epochs),
        "non_finite": sum(epoch.non_finite for epoch in epochs),
        "rollbacks": sum(epoch.rollbacks for epoch in epochs),
        "overfit_epochs": [epoch.epoch for epoch in epochs if epoch.overfit],
    }


def _decline(epochs: Sequence[Epoch]) -> str:
    """The figures that show the overfitting in the last of `epochs`, as a verb phrase."""
    now = epochs[-1].train_pgd_accuracy or 0.0
    best = max(epoch.train_pgd_accuracy or 0.0 for epoch in epochs)
    if has_fallen(now, best):
        return f"fell from {best:.1%} to {now:.1%}"
    return f"is {now:.1%}, and {epochs[-1].train_robust_accuracy:.1%} under the training attack"


def _leaks(epoch: Epoch) -> bool:
    clean, robust = epoch.train_clean_accuracy, epoch.train_robust_accuracy
    return clean is not None and robust is not None and robust > clean + LEAK
