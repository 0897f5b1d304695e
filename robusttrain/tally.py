"""What an epoch came to: counted on the device batch by batch, a row of `train.csv` at its end."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from robusttrain import distributed
from robusttrain.defenses import Objective
from robusttrain.errors import NonFiniteLossError


@dataclass(frozen=True)
class Epoch:
    """A row of `train.csv`; accuracies are shares, and None where nothing was computed."""

    epoch: int
    seconds: float
    lr: float
    loss: float
    train_clean_accuracy: float | None
    train_robust_accuracy: float | None
    val_clean_accuracy: float | None
    val_robust_accuracy: float | None

    @property
    def rank(self) -> tuple[float, float]:
        """What `best.pt` is chosen by: robust accuracy on the validation split, then clean."""
        return (self.val_robust_accuracy or 0.0, self.val_clean_accuracy or 0.0)

    def row(self) -> dict[str, Any]:
        """The columns of `train.csv`."""
        return asdict(self)


class Tally:
    """Losses and hits of an epoch, kept on the device until somebody wants to see them."""

    def __init__(self) -> None:
        self.images = 0
        self.batches: list[int] = []
        self.losses: list[Tensor] = []
        self.sizes: list[int] = []
        self.hits: dict[str, Tensor] = {}
        self.rates: list[float] = []

    @classmethod
    def of(cls, state: Mapping[str, Any], device: torch.device) -> "Tally":
        """The tally whose `state` this was."""
        tally = cls()
        vars(tally).update(state)
        tally.losses = list(state["losses"].to(device))
        tally.hits = {name: hits.to(device) for name, hits in state["hits"].items()}
        return tally

    def state(self) -> dict[str, Any]:
        """Tensors, on the CPU, and plain values."""
        losses = torch.stack(self.losses).cpu() if self.losses else torch.empty(0)
        hits = {name: hits.cpu() for name, hits in self.hits.items()}
        return {**vars(self), "losses": losses, "hits": hits}

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
                right = logits.detach().argmax(1).view(len(y), -1) == y[:, None]
                hits = right.double().mean(1).sum()
                self.hits[name] = self.hits.get(name, torch.zeros_like(hits)) + hits

    def shown(self, epoch: int) -> tuple[float, dict[str, float]]:
        """The latest loss, and the accuracies so far; a loss that is not finite is noticed here.

        Raises
        ------
        NonFiniteLossError
            Naming the first batch of `epoch` with such a loss.
        """
        losses = torch.stack(self.losses).cpu()
        for step in (~losses.isfinite()).nonzero().flatten().tolist():
            raise NonFiniteLossError(
                f"the loss became {losses[step]} in epoch {epoch}, batch "
                f"{self.batches[step]}, at learning rate {self.rates[step]:.3g}; "
                f"try a lower optimizer.lr"
            )
        shares = {name: float(hits) / self.images for name, hits in self.hits.items()}
        return float(losses[-1]), shares

    def figures(self, epoch: int) -> dict[str, Any]:
        """The training columns of an `Epoch`, over all processes."""
        self.shown(epoch)
        losses = torch.stack(self.losses).double().cpu()
        own = {name: float(hits) for name, hits in self.hits.items()}
        own["loss"] = float((losses * torch.tensor(self.sizes)).sum())
        total = distributed.summed({**own, "images": float(self.images)})
        shares = {name: total[name] / total["images"] for name in own}
        return {
            "loss": shares["loss"],
            "train_clean_accuracy": shares.get("clean"),
            "train_robust_accuracy": shares.get("robust"),
        }
