"""The base of the attacks that search a ball."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from robusttrain import ranges, seeding
from robusttrain.attacks import ThreatFields, Traits
from robusttrain.attacks.attack_loss import AttackLoss, Label, Loss, attack_loss, cross_entropy
from robusttrain.attacks.images import check_images
from robusttrain.attacks.model_view import Mode, frozen
from robusttrain.threat import Norm, check_lengths
from robusttrain.threat.balls import Ball, ball

# The most that an attack spends where there is nothing to be found.
FRUGAL = {"steps": 3, "queries": 50, "restarts": 1, "targets": 2}


def check_step_size(norm: str, step_size: float | None) -> None:
    """Raise `InputError` unless `step_size` is above 0 and a length in `norm`, or left out."""
    if step_size is not None:
        ranges.above(0, step_size=step_size)
        check_lengths(norm, step_size=step_size)


@dataclass
class BallAttack(ThreatFields, ABC):
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
        ranges.one_of(list(Norm), norm=self.norm)
        check_lengths(self.norm, eps=self.eps)
        ranges.one_of(list(Label), label=self.label)
        ranges.one_of(list(Mode), mode=self.mode)
        # Plain words are welcome in a notebook, but `is` knows members only.
        self.norm, self.label, self.mode = Norm(self.norm), Label(self.label), Mode(self.mode)

    def fitted(self, num_classes: int) -> Self:
        """The attack for a model with so many classes; itself, where it can take any number."""
        return self

    def frugal(self) -> Self:
        """The same attack with a few steps, queries, restarts and targets."""
        own = vars(self)
        most = {key: few for key, few in FRUGAL.items() if own.get(key) is not None}
        return replace(self, **{key: min(own[key], few) for key, few in most.items()})

    @property
    def traits(self) -> Traits:
        """What kind of an attack it is."""
        return Traits(label=self.label, mode=self.mode, pooled=True)

    @property
    def ball(self) -> Ball:
        """The ball that the attack searches."""
        return ball(self.threat)

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        loss: Loss = cross_entropy,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Adversarial images for `x` (N, C, H, W) with labels `y` (N,).

        Raises
        ------
        InputError
            If `x` is not float32 or float64, or has values outside [0, 1].
        """
        check_images(x)
        generator = generator or seeding.fresh(x.device)
        with frozen(model, self.mode):
            surrogate = attack_loss(model, x, y, label=self.label, loss=loss)
            return self.search(surrogate, x, generator).detach()

    @abstractmethod
    def search(self, surrogate: AttackLoss, x: Tensor, generator: torch.Generator) -> Tensor:
        """The worst point that the attack finds in S(x)."""
