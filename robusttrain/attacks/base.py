"""What attacks share: a model held still, and the surrogate loss with its input gradient."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from robusttrain import ranges, seeding
from robusttrain.models.modes import modes_restored
from robusttrain.noise import NoiseLayer
from robusttrain.threat import Ball, Norm, ball

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits (N, K), labels (N,)) -> the loss of each image, (N,).

One that keeps something for each image has `take(rows)`, which gives it for some of the images.
"""


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


class Mode(StrEnum):
    """The mode of the model's layers while an attack runs."""

    eval = "eval"
    train = "train"


@contextmanager
def held_still(model: nn.Module, mode: Mode = Mode.eval) -> Iterator[None]:
    """Put `model` in `mode` without parameter gradients, and put everything back afterwards.

    Noise layers keep the mode they are in. In train mode BatchNorm normalises with the statistics
    of the batch, as in training, but its running statistics stay as they are.
    """
    modules = [module for module in model.modules() if not isinstance(module, NoiseLayer)]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tracking = [m for m in modules if isinstance(m, _BatchNorm) and m.track_running_stats]
    # The layers of a TorchScript program cannot be told; what they do is undone.
    scripted = [m for m in modules if isinstance(m, torch.jit.ScriptModule)]
    buffers = [(b, b.clone()) for m in scripted for b in m.buffers(recurse=False)]
    with modes_restored(model):
        try:
            for module in modules:
                module.training = mode is Mode.train
            for parameter in parameters:
                parameter.requires_grad_(False)
            for norm in tracking:
                norm.track_running_stats = mode is Mode.eval
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)
            for norm in tracking:
                norm.track_running_stats = True
            for buffer, before in buffers:
                buffer.copy_(before)


def outputs_as_in(model: nn.Module, mode: Mode) -> bool:
    """Whether `model`, held still in `mode`, returns what it returns in the mode that it is in.

    BatchNorm and dropout make the difference; layers of other kinds are taken to have none.
    """
    kinds = _BatchNorm, _DropoutNd
    return all(m.training is (mode is Mode.train) for m in model.modules() if isinstance(m, kinds))


def predictions(logits: Tensor) -> Tensor:
    """The class of each row of `logits`, or -1, which is never right, where one is not finite."""
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


class Metered(nn.Module):
    """The view of a model that evaluation gives to attacks: passes are counted, batches are cut.

    Parameters
    ----------
    model
        The model; all but the passes and the batches is its own.
    size
        Most images in one pass, 1 or more.
    draws
        How many passes of the network one call stands for: those that a mean over noise takes.
    random
        Whether outputs hang on noise. No attack then takes a single look for a success.

    Attributes
    ----------
    forward_passes, backward_passes
        Images that went through the network, in each direction.
    non_finite
        How many of them met logits or gradients that are not finite.
    """

    def __init__(
        self, model: nn.Module, size: int, draws: int = 1, *, random: bool = False
    ) -> None:
        super().__init__()
        self.model, self.size, self.draws, self.random = model, size, draws, random
        self.forward_passes = self.backward_passes = 0
        # Where the model is: reading it earlier than at the end would wait for the device.
        self.non_finite: Tensor | int = 0
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K), in passes of `size` images at most."""
        return torch.cat([self._counted(part) for part in torch.split(x, self.size)])

    def _counted(self, x: Tensor) -> Tensor:
        self.forward_passes += self.draws * len(x)
        if x.requires_grad:
            # The hook belongs to this pass alone, whatever else the caller does with its tensor.
            x = x.view_as(x)
            x.register_hook(self._count_backward)  # type: ignore[no-untyped-call]
        logits: Tensor = self.model(x)
        self.non_finite = (~logits.isfinite().all(1)).sum() + self.non_finite
        return logits

    def _count_backward(self, gradient: Tensor) -> None:
        self.backward_passes += self.draws * len(gradient)
        self.non_finite = (~gradient.isfinite().flatten(1).all(1)).sum() + self.non_finite


class Evaluation(NamedTuple):
    """What the surrogate says about a batch of points.

    `gradient` is (N, ...), `value` (N,), `logits` (N, K); `usable` (N,) says whose gradient shows
    any direction, that is, has an entry that is finite and belongs to logits that are finite.
    """

    gradient: Tensor
    value: Tensor
    logits: Tensor
    usable: Tensor


@dataclass
class Surrogate:
    """The function of the input that an attack climbs: sign * loss(model(x), labels)."""

    model: nn.Module
    labels: Tensor
    loss: Loss
    targeted: bool

    def take(self, rows: Tensor | slice) -> Self:
        """The same function for some of the images."""
        loss = self.loss.take(rows) if hasattr(self.loss, "take") else self.loss
        return replace(self, labels=self.labels[rows], loss=loss)

    def value(self, logits: Tensor) -> Tensor:
        """What the attack maximises, shape (N,)."""
        losses = self.loss(logits, self.labels)
        return -losses if self.targeted else losses

    def evaluate(self, x_adv: Tensor) -> Evaluation:
        """One forward pass and one backward pass that reaches the input only.

        Entries of the gradient that are not finite count as zero: a pixel without a usable slope
        stays, and does not poison the others. Where the model is metered, its batches bound the
        memory of the backward pass, too.
        """
        size = self.model.size if isinstance(self.model, Metered) else max(1, len(x_adv))
        parts = [slice(start, start + size) for start in range(0, max(1, len(x_adv)), size)]
        if len(parts) == 1:
            return self._evaluate(x_adv)
        seen = [self.take(part)._evaluate(x_adv[part]) for part in parts]
        return Evaluation(*map(torch.cat, zip(*seen, strict=True)))

    def _evaluate(self, x_adv: Tensor) -> Evaluation:
        point = x_adv.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.model(point)
            value = self.value(logits)
            (gradient,) = torch.autograd.grad(value.sum(), point)
        usable = gradient.isfinite().flatten(1).any(1) & logits.isfinite().all(1)
        return Evaluation(gradient.nan_to_num(0, 0, 0), value.detach(), logits.detach(), usable)

    @torch.no_grad()
    def score(self, x_adv: Tensor) -> tuple[Tensor, Tensor]:
        """(value, logits) at `x_adv`, by one forward pass."""
        logits = self.model(x_adv)
        return self.value(logits), logits

    def succeeded(self, logits: Tensor) -> Tensor:
        """Whether each image is where the attack wants it, shape (N,).

        Of a model that draws noise it is never said: an attack that stops at the first lucky draw
        returns points that fool no fresh one, while the point of highest value does.
        """
        if isinstance(self.model, Metered) and self.model.random:
            return torch.zeros_like(self.labels, dtype=torch.bool)
        hit = predictions(logits) == self.labels
        return hit if self.targeted else ~hit


def surrogate_for(model: nn.Module, x: Tensor, y: Tensor, *, label: Label, loss: Loss) -> Surrogate:
    """The surrogate for `label`; all but the given one cost one more forward pass."""
    if label is Label.given:
        return Surrogate(model, y, loss, targeted=False)
    with torch.no_grad():
        logits = model(x)
    if label is Label.predicted:
        return Surrogate(model, logits.argmax(1), loss, targeted=False)
    return Surrogate(model, logits.argmin(1), loss, targeted=True)


@dataclass
class BallAttack(ABC):
    """Base of the attacks that search a ball: holds the model still and builds the surrogate.

    Parameters
    ----------
    norm, eps
        The threat model; `eps` in pixel units of [0, 1], 0 or more.
    label
        The label that the attack moves away from, or towards.
    mode
        Mode of the model while crafting. Noise keeps its own.
    """

    norm: Norm = Norm.linf
    eps: float = 8 / 255
    label: Label = Label.given
    mode: Mode = Mode.eval

    def __post_init__(self) -> None:
        ranges.at_least(0, eps=self.eps)
        ranges.one_of(list(Norm), norm=self.norm)
        ranges.one_of(list(Label), label=self.label)
        ranges.one_of(list(Mode), mode=self.mode)
        # Plain words are welcome in a notebook, but `is` knows members only.
        self.norm, self.label, self.mode = Norm(self.norm), Label(self.label), Mode(self.mode)

    def fitted(self, num_classes: int) -> Self:
        """The attack for a model with so many classes; itself, where it can take any number."""
        return self

    @property
    def ball(self) -> Ball:
        """The ball that the attack searches."""
        return ball(self.norm, self.eps)

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        loss: Loss = cross_entropy,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Adversarial images for `x` (N, C, H, W) with labels `y` (N,)."""
        generator = generator or seeding.fresh(x.device)
        with held_still(model, self.mode):
            surrogate = surrogate_for(model, x, y, label=self.label, loss=loss)
            return self.search(surrogate, x, generator).detach()

    @abstractmethod
    def search(self, surrogate: Surrogate, x: Tensor, generator: torch.Generator) -> Tensor:
        """The worst point that the attack finds in S(x)."""
