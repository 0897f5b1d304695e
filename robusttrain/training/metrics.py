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

    `loss` is the mean over the objectives that were finite, and `non_finite` counts the others.
    `train_pgd_accuracy` is that of PGD-10 on some training images behind the epoch, `rollbacks` how
    often the epoch was begun again, `overfit` whether it has overfitted catastrophically.
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
        """What `best.pt` is chosen by: robust accuracy on the validation split, then clean.

        Where there is none, an epoch that has overfitted catastrophically comes last.
        """
        return (self.val_robust_accuracy or 0.0, self.val_clean_accuracy or 0.0, not self.overfit)

    def row(self) -> dict[str, Any]:
        """The columns of `train.csv`."""
        return asdict(self)


class EpochMetrics:
    """Losses and hits of an epoch, kept on the device until somebody wants to see them.

    A loss that is not finite stands for an objective of which the loss or the gradient was not.
    """

    def __init__(self) -> None:
        self.images = 0
        self.batches: list[int] = []
        self.losses: list[Tensor] = []
        self.sizes: list[int] = []
        self.hits: dict[str, Tensor] = {}
        self.rates: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        """Tensors, on the CPU, and plain values."""
        losses = torch.stack(self.losses).cpu() if self.losses else torch.empty(0)
        hits = {name: hits.cpu() for name, hits in self.hits.items()}
        return {**vars(self), "losses": losses, "hits": hits}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from `state`, counting on `device`."""
        vars(self).update(state)
        self.losses = list(state["losses"].to(device))
        self.hits = {name: hits.to(device) for name, hits in state["hits"].items()}

    def add(self, batch: int, rate: float, objective: Objective, y: Tensor) -> None:
        """Count one objective of a batch."""
        self.images += len(y)
        self.batches.append(batch)
        self.losses.append(objective.loss.detach())
        self.sizes.append(len(y))
        self.rates.append(rate)
        for name, logits in (("clean", objective.clean), ("robust", objective.adversarial)):
            if logits is not None:
                # A row for each draw of an image, where several are trained on.
                right = predictions(logits.detach()).view(len(y), -1) == y[:, None]
                hits = right.double().mean(1).sum()
                self.hits[name] = self.hits.get(name, torch.zeros_like(hits)) + hits

    @property
    def sound(self) -> bool:
        """Whether every objective so far was finite. Waits for the device."""
        return not self.losses or bool(torch.stack(self.losses).isfinite().all())

    def check(self, epoch: int) -> None:
        """Look at what all processes have; waits for the device, and for the others.

        Raises
        ------
        NonFiniteLossError
            Naming the first batch of `epoch` with an objective that was not finite.
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

    def shown(self) -> tuple[float, dict[str, float]]:
        """The latest loss, and the accuracies so far."""
        shares = {name: float(hits) / self.images for name, hits in self.hits.items()}
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
        own = {name: float(hits) for name, hits in self.hits.items()}
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
