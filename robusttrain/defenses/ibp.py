"""Training on bounds that no attack can exceed, instead of on what one attack finds."""

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.attacks import Attack, Loss, ThreatFields
from robusttrain.attacks.none import is_none, refuse_none
from robusttrain.bounds.intervals import Interval, refuse_unbounded
from robusttrain.defenses import Objective, each_row
from robusttrain.models.modes import modes_restored
from robusttrain.threat import Norm, check_lengths


@dataclass
class IBP(ThreatFields):
    """min E[ (1 - weight) L(f(x), y) + weight L(m(x), y) ] (Gowal et al. 2018).

    Their kappa is 1 - weight. m(x) are the worst logits that interval bound propagation leaves
    possible in S(x): no point of S(x) has a larger loss in eval mode, up to rounding. A forward and
    a backward pass of intervals, which cost about two of images each, and one forward and one
    backward pass for the images.

    The bounds are those of the network in eval mode: BatchNorm uses its running statistics, and
    neither dropout nor training noise is active. The bounds of an untrained network are so wide
    that training ends at the uniform output, unless radius and weight grow from 0 on, as in the
    paper: `training.curriculum.eps_warmup` with `training.curriculum.per_batch`.

    Parameters
    ----------
    attack
        None: with an attack it is `MTLIBP`.
    norm
        Only linf: an interval is a box, so it would only enclose the balls of other norms.
    eps
        Radius that the bounds hold for, in pixel units, 0 or more. A radius above that of the
        evaluation proves more there.
    weight
        Weight of the loss at the bounds, from 0 to 1.
    """

    attack: Attack
    norm: Norm = Norm.linf
    eps: float = 0.1
    weight: float = 0.5

    def __post_init__(self) -> None:
        check_lengths(self.norm, eps=self.eps)
        ranges.within(0, 1, weight=self.weight)
        self.check_attack()

    def check_attack(self) -> None:
        """Raise `InputError` if there is an attack, since that is another method."""
        name = type(self.attack).__name__
        allowed = "none: training on bounds and on adversarial images is defense=mtl_ibp"
        ranges.require(is_none(self.attack), "attack", name, allowed)

    def scheduled(self, share: float) -> "IBP":
        """A copy with `share` of the weight, for the warm-up of `training.curriculum`."""
        return replace(self, weight=share * self.weight)

    def refuse_unfit(self, model: nn.Module, image_shape: tuple[int, int, int]) -> None:
        """Raise `InputError` in other norms, and if `model` has a layer without known bounds.

        Only training asks for it: the trained model may be evaluated in other norms.
        """
        refuse_unbounded(model, image_shape, self.norm, "defense=ibp or mtl_ibp")

    def inner(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator
    ) -> Tensor:
        """The images of the first loss, (N, C, H, W)."""
        return self.attack(model, x, y, generator=generator)

    def outer(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, loss: Loss
    ) -> Objective:
        """The weighted sum of the loss at images and the loss at the bounds."""
        logits, worst = model(x_adv), self._worst_logits(model, x, y)
        mixture = (1 - self.weight) * loss(logits, y) + self.weight * loss(worst, y)
        kind = "clean" if is_none(self.attack) else "adversarial"
        return Objective(mixture.mean(), **{kind: logits})

    def _worst_logits(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with modes_restored(model):
            outputs = cast(Interval, model.eval()(Interval.around(x, self.eps)))
        return outputs.margins(each_row(y, outputs.centre))


@dataclass
class MTLIBP(IBP):
    """min E[ (1 - weight) L(f(adv(x)), y) + weight L(m(x), y) ] (De Palma et al. 2024, MTL-IBP).

    "Expressive losses for verified robustness via convex combinations", with alpha = weight: the
    adversarial images replace x in the first loss of `IBP`. Everything else is the same.

    Parameters
    ----------
    attack
        Any attack but none.
    """

    def check_attack(self) -> None:
        """Raise `InputError` if there is no attack, since that is another method."""
        refuse_none(self.attack)
