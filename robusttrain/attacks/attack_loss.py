"""What attacks climb: the surrogate loss, with its input gradient."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple, Protocol, Self, runtime_checkable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from robusttrain.attacks.model_view import QueryCounter, logits_of, predictions

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits (N, K), labels (N,)) -> the loss of each image, (N,).

One that keeps something for each image is `PerImage`.
"""


@runtime_checkable
class PerImage(Protocol):
    """A loss that keeps something for each image of the batch."""

    def take(self, rows: Tensor | slice) -> Loss:
        """The same loss for some of the images."""


Outputs = Callable[[Tensor, slice], Tensor]
"""(logits (n, K) of some of the images, which of them these are) -> functions of theirs, (n, M)."""


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each image, shape (N,)."""
    return F.cross_entropy(logits, y, reduction="none")


class Label(StrEnum):
    """The label an attack works with.

    `given`, that of the data set, and `predicted` are moved away from; the predicted one keeps the
    true label from leaking into the perturbation (Kurakin et al. 2017). `least_likely` is moved
    towards.
    """

    given = "given"
    predicted = "predicted"
    least_likely = "least_likely"


class Gradients(NamedTuple):
    """The loss and its gradient at a batch of points.

    `gradient` is (N, ...), `value` (N,), `logits` (N, K). `usable` (N,) marks points whose gradient
    has a finite entry and whose logits are finite.
    """

    gradient: Tensor
    value: Tensor
    logits: Tensor
    usable: Tensor


@dataclass
class AttackLoss:
    """The function of the input that an attack climbs: sign * loss(model(x), labels)."""

    model: nn.Module
    labels: Tensor
    loss: Loss
    targeted: bool

    def take(self, rows: Tensor | slice) -> Self:
        """The same function for some of the images."""
        loss = self.loss.take(rows) if isinstance(self.loss, PerImage) else self.loss
        return replace(self, labels=self.labels[rows], loss=loss)

    def value(self, logits: Tensor) -> Tensor:
        """What the attack maximises, shape (N,)."""
        losses = self.loss(logits, self.labels)
        return -losses if self.targeted else losses

    def evaluate(self, x_adv: Tensor) -> Gradients:
        """One forward pass and one backward pass that reaches the input only.

        Entries of the gradient that are not finite count as zero: a pixel without a usable slope
        stays, and does not poison the others. Where the model is metered, its batches bound the
        memory of the backward pass, too.
        """
        parts = self._parts(len(x_adv))
        if len(parts) == 1:
            return self._evaluate(x_adv)
        seen = [self.take(part)._evaluate(x_adv[part]) for part in parts]
        return Gradients(*map(torch.cat, zip(*seen, strict=True)))

    def jacobian(self, x_adv: Tensor, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """(M functions of the logits (N, M), their gradients in the input (N, M, ...)).

        One forward pass, and M backward passes that reach the input only; entries and memory as in
        `evaluate`.
        """
        seen = [self._jacobian(x_adv, part, outputs) for part in self._parts(len(x_adv))]
        if len(seen) == 1:
            return seen[0]
        values, slopes = map(torch.cat, zip(*seen, strict=True))
        return values, slopes

    def _jacobian(self, x_adv: Tensor, part: slice, outputs: Outputs) -> tuple[Tensor, Tensor]:
        point = x_adv[part].detach().requires_grad_()
        with torch.enable_grad():
            values = outputs(logits_of(self.model, point), part)
            columns = values.sum(0).unbind()
            slopes = [
                torch.autograd.grad(column, point, retain_graph=True)[0] for column in columns
            ]
        return values.detach(), torch.stack(slopes, 1).nan_to_num_(0, 0, 0)

    def _parts(self, count: int) -> list[slice]:
        """The batches of so many images whose graphs fit into memory."""
        size = self.model.size if isinstance(self.model, QueryCounter) else max(1, count)
        return [slice(start, start + size) for start in range(0, max(1, count), size)]

    def _evaluate(self, x_adv: Tensor) -> Gradients:
        point = x_adv.detach().requires_grad_()
        with torch.enable_grad():
            logits = logits_of(self.model, point)
            value = self.value(logits)
            (gradient,) = torch.autograd.grad(value.sum(), point)
        usable = gradient.isfinite().flatten(1).any(1) & logits.isfinite().all(1)
        return Gradients(gradient.nan_to_num(0, 0, 0), value.detach(), logits.detach(), usable)

    @torch.no_grad()
    def score(self, x_adv: Tensor) -> tuple[Tensor, Tensor]:
        """(value, logits) at `x_adv`, by one forward pass."""
        logits = logits_of(self.model, x_adv)
        return self.value(logits), logits

    def succeeded(self, logits: Tensor) -> Tensor:
        """Whether each image is where the attack wants it, shape (N,).

        Of a model that draws noise it is never said: an attack that stops at the first lucky draw
        returns points that fool no fresh one, while the point of highest value does.
        """
        if isinstance(self.model, QueryCounter) and self.model.random:
            return torch.zeros_like(self.labels, dtype=torch.bool)
        hit = predictions(logits) == self.labels
        return hit if self.targeted else ~hit


def attack_loss(model: nn.Module, x: Tensor, y: Tensor, *, label: Label, loss: Loss) -> AttackLoss:
    """The surrogate for `label`; all but the given one cost one more forward pass."""
    if label is Label.given:
        return AttackLoss(model, y, loss, targeted=False)
    with torch.no_grad():
        logits = logits_of(model, x)
    if label is Label.predicted:
        return AttackLoss(model, logits.argmax(1), loss, targeted=False)
    return AttackLoss(model, logits.argmin(1), loss, targeted=True)
