"""The base of the defenses that train on interval bounds."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.attacks import Attack, Loss, ThreatFields
from robusttrain.attacks.none import is_none
from robusttrain.bounds.intervals import Interval, refuse_unbounded
from robusttrain.defenses import Objective, each_row
from robusttrain.defenses.bound_regulariser import ReLUInputs, regulariser
from robusttrain.errors import InputError
from robusttrain.models.batch_statistics import BatchStatistics, normalises_batches
from robusttrain.models.modes import modes_restored
from robusttrain.threat import Norm, check_lengths


class Statistics(StrEnum):
    """The statistics that BatchNorm normalises bounds with in training.

    `batch` takes the mean and the variance of the images of the same step, with their gradient, as
    Shi et al. 2021 do: images and bounds go through the same function. `running` takes those that
    the layers have collected, which is the function that an evaluation bounds.
    """

    batch = "batch"
    running = "running"


@dataclass
class BoundDefense(ThreatFields, ABC):
    """Base of the defenses that train on interval bounds.

    Except for BatchNorm, the bounds are those of the network in eval mode: neither dropout nor
    training noise is active.

    Parameters
    ----------
    attack
        The attack that finds the images of the loss.
    norm
        Only linf: an interval is a box, so it would only enclose the balls of other norms.
    eps
        Radius that the evaluation asks for, in pixel units, 0 or more.
    eps_margin
        What is added to `eps` in training, in pixel units, 0 or more. Gowal et al. 2018 train at
        0.2 and 0.4 to prove at 0.1 and 0.3.
    statistics
        The statistics that BatchNorm normalises bounds with: `batch` or `running`. If several
        processes train, those of the images of each process.
    regularisation
        Weight of the two regularisers of Shi et al. 2021 (see `regulariser`), 0 or more; they use
        0.5. The warm-up of `training.curriculum` lowers it from this value at radius 0 to 0 at the
        whole radius. Without a warm-up it stays.
    """

    attack: Attack
    norm: Norm = Norm.linf
    eps: float = 0.1
    eps_margin: float = 0.0
    statistics: Statistics = Statistics.batch
    regularisation: float = 0.0

    def __post_init__(self) -> None:
        check_lengths(self.norm, eps=self.eps, eps_margin=self.eps_margin)
        ranges.one_of(list(Statistics), statistics=self.statistics)
        self.statistics = Statistics(self.statistics)
        ranges.at_least(0, regularisation=self.regularisation)
        self.check_attack()

    @abstractmethod
    def check_attack(self) -> None:
        """Raise `InputError` if the attack makes it another method."""

    @abstractmethod
    def combined(self, logits: Tensor, worst: Tensor, y: Tensor, loss: Loss) -> Tensor:
        """The loss of each image, (N,), from logits and worst logits (N, K)."""

    @property
    def radius(self) -> float:
        """The radius that training has bounds for, in pixel units."""
        return self.eps + self.eps_margin

    def scheduled(self, share: float) -> Self:
        """A copy with `share` of the margin, and the other share of the regularisers."""
        return replace(
            self,
            eps_margin=share * self.eps_margin,
            regularisation=(1 - share) * self.regularisation,
        )

    def refuse_unfit(self, model: nn.Module, image_shape: tuple[int, int, int]) -> None:
        """Raise `InputError` in other norms, and if `model` has a layer without known bounds.

        So are settings that have no effect on `model`. Only training asks for it: the trained model
        may be evaluated in other norms.
        """
        refuse_unbounded(model, image_shape, self.norm, "defense=ibp or another one on bounds")
        if self.statistics is Statistics.running and not normalises_batches(model):
            problem = "has no effect on a model without BatchNorm"
            raise InputError("defense.statistics", "running", problem=problem)
        if self.regularisation > 0 and not _relu_inputs(model, image_shape):
            problem = "has no effect on a model without ReLU"
            raise InputError("defense.regularisation", self.regularisation, problem=problem)

    def inner(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Any:
        """The images of the first loss, (N, C, H, W)."""
        return self.attack(model, x, y, generator=generator)

    def images(self, x: Tensor, found: Tensor) -> Tensor:
        """The images whose logits are used, from the images `x` and the result of `inner`."""
        return found

    def box(self, x: Tensor, found: Tensor) -> Interval:
        """The box whose bounds are used."""
        return Interval.around(x, self.radius)

    def worst_logits(self, model: nn.Module, box: Interval, y: Tensor) -> Tensor:
        """Upper bounds (N, K) on z_k - z_y in the box; `model` is in eval mode."""
        outputs = cast(Interval, model(box))
        return outputs.margins(each_row(y, outputs.centre))

    def outer(self, model: nn.Module, x: Tensor, found: Any, y: Tensor, *, loss: Loss) -> Objective:
        """The loss from the logits of images and from bounds, and the regularisers."""
        images = self.images(x, found)
        statistics = BatchStatistics(model, active=self.statistics is Statistics.batch)
        with statistics.recorded():
            logits = model(images)
        box = self.box(x, found)
        relus = ReLUInputs()
        with modes_restored(model), statistics.installed(), relus:
            worst = self.worst_logits(model.eval(), box, y)
        total = self.combined(logits, worst, y, loss).mean()
        if self.regularisation > 0:
            total = total + self.regularisation * regulariser(box, relus.found)
        kind = "clean" if images is x or is_none(self.attack) else "adversarial"
        return Objective(total, **{kind: logits})


@dataclass
class WeightedBounds(BoundDefense):
    """Base of the methods that mix logits of images and bounds with a fixed weight.

    Parameters
    ----------
    weight
        Weight of the bounds, from 0 to 1.
    weight_warmup
        Whether the warm-up of `training.curriculum` increases the weight from 0 on, as Gowal et al.
        2018 do, or the radius alone, as the later papers do.
    """

    weight: float = 0.5
    weight_warmup: bool = True

    def __post_init__(self) -> None:
        ranges.within(0, 1, weight=self.weight)
        super().__post_init__()

    def scheduled(self, share: float) -> Self:
        """As in the base, and with `share` of the weight."""
        weight = share * self.weight if self.weight_warmup else self.weight
        return replace(super().scheduled(share), weight=weight)


def _relu_inputs(model: nn.Module, image_shape: tuple[int, int, int]) -> list[Interval]:
    """What enters the ReLUs of `model` for a grey image."""
    grey = torch.full((1, *image_shape), 0.5)
    relus = ReLUInputs()
    with modes_restored(model), torch.no_grad(), relus:
        model.eval()(Interval.around(grey, 0.0))
    return relus.found
