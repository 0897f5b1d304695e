"""Running metrics of an epoch, accumulated on the device, and its row of `train.csv`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from robusttrain.attacks.model_view import predictions
from robusttrain.defenses import Objective
from robusttrain.errors import NonFiniteLossError
from robusttrain.runtime import distributed


@dataclass(frozen=True)
class Epoch:
    """A row of `train.csv`; accuracies are shares, and None where nothing was computed.

    `loss` is the mean over the finite objectives, and `non_finite` counts the others.
    `train_pgd_accuracy` is the accuracy of some training images under PGD-10 after the epoch,
    `rollbacks` the number of times that the epoch was restarted, and `overfit` whether it has
    overfitted catastrophically.
    """

    epoch: int
    seconds: float
    lr: float
    loss: float
    train_clean_accuracy: float | None
    train_robust_accuracy: float | None
    val_clean_accuracy: float | None
    val_robust_accuracy: float | None
    non_finite: int
    train_pgd_accuracy: float | None
    rollbacks: int
    overfit: bool

    @property
    def rank(self) -> tuple[float, float, bool]:
        """The key that `best.pt` maximises: robust, then clean accuracy on the validation split.

        Without a validation split, an epoch that has overfitted catastrophically comes last.
        """
        return (self.val_robust_accuracy or 0.0, self.val_clean_accuracy or 0.0, not self.overfit)

    def row(self) -> dict[str, Any]:
        """The columns of `train.csv`."""
        return asdict(self)


class EpochMetrics:
    """Losses and correct predictions of an epoch, kept on the device until they are read.

    A non-finite loss stands for an objective with a non-finite loss or gradient.
    """

    def __init__(self) -> None:
        self.images = 0
        self.batches: list[int] = []
        self.losses: list[Tensor] = []
        self.sizes: list[int] = []
        # How many images were classified correctly, clean and adversarial.
        self.correct: dict[str, Tensor] = {}
        self.rates: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU, and plain values."""
        return {
            "images": self.images,
            "batches": self.batches,
            "losses": torch.stack(self.losses).cpu() if self.losses else torch.empty(0),
            "sizes": self.sizes,
            "hits": {name: count.cpu() for name, count in self.correct.items()},
            "rates": self.rates,
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from `state`, with tensors on `device`."""
        self.images, self.batches = state["images"], state["batches"]
        self.losses = list(state["losses"].to(device))
        self.sizes, self.rates = state["sizes"], state["rates"]
        self.correct = {name: count.to(device) for name, count in state["hits"].items()}

    def add(self, batch: int, rate: float, objective: Objective, y: Tensor) -> None:
        """Add one objective of a batch, with its learning rate and the labels (N,)."""
        self.images += len(y)
        self.batches.append(batch)
        self.losses.append(objective.loss.detach())
        self.sizes.append(len(y))
        self.rates.append(rate)
        for name, logits in (("clean", objective.clean), ("robust", objective.adversarial)):
            if logits is not None:
                # With several draws of noise an image has a row for each of them.
                right = predictions(logits.detach()).view(len(y), -1) == y[:, None]
                count = right.double().mean(1).sum()
                self.correct[name] = self.correct.get(name, torch.zeros_like(count)) + count

    @property
    def all_finite(self) -> bool:
        """Whether every objective so far was finite. Waits for the device."""
        return not self.losses or bool(torch.stack(self.losses).isfinite().all())

    def check(self, epoch: int) -> None:
        """Check the losses of all processes. Waits for the device and for the other processes.

        Raises
        ------
        NonFiniteLossError
            If an objective was non-finite; the message names the first such batch of `epoch`.
        """
        losses = torch.stack(self.losses).cpu()
        found = [*(~losses.isfinite()).nonzero().flatten().tolist(), len(losses)]
        first = found[0]
        step, loss = min(distributed.all_gather((first, float(losses[first % len(losses)]))))
        if step < len(losses):
            raise NonFiniteLossError(
                f"the loss or its gradient became {loss} in epoch {epoch}, batch "
                f"{self.batches[step]}, at learning rate {self.rates[step]:.3g}; "
                f"try a lower optimizer.lr"
            )

    def latest(self) -> tuple[float, dict[str, float]]:
        """The latest loss, and the accuracies so far. Waits for the device."""
        shares = {name: float(count) / self.images for name, count in self.correct.items()}
        return float(self.losses[-1]), shares

    def figures(self, epoch: int) -> dict[str, Any]:
        """The training columns of an `Epoch`, over all processes.

        Raises
        ------
        NonFiniteLossError
            If no objective of `epoch` was finite.
        """
        losses, sizes = torch.stack(self.losses).double().cpu(), torch.tensor(self.sizes)
        finite = losses.isfinite()
        own = {name: float(count) for name, count in self.correct.items()}
        total = distributed.summed(
            {
                **own,
                "images": float(self.images),
                "loss": float((losses * sizes)[finite].sum()),
                "finite": float(sizes[finite].sum()),
            }
        )
        if not total["finite"]:
            raise NonFiniteLossError(
                f"no loss of epoch {epoch} was finite, or none of their gradients; "
                f"try a lower optimizer.lr"
            )
        shares = {name: total[name] / total["images"] for name in own}
        return {
            "loss": total["loss"] / total["finite"],
            "train_clean_accuracy": shares.get("clean"),
            "train_robust_accuracy": shares.get("robust"),
            "non_finite": max(distributed.all_gather(int((~finite).sum()))),
        }
