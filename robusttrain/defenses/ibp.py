"""Training on bounds: what no attack can exceed, instead of what one attack finds."""

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.attacks import Attack, Loss, ThreatFields
from robusttrain.attacks.none import is_none, refuse_none
from robusttrain.defenses import Objective, each_row
from robusttrain.intervals import Interval, refuse_unbounded
from robusttrain.models.modes import modes_restored
from robusttrain.threat import Norm


@dataclass
class IBP(ThreatFields):
    """min E[ (1 - weight) L(f(x), y) + weight L(m(x), y) ] (Gowal et al. 2018).

    Their kappa is 1 - weight, and m(x) are the worst logits that interval bound propagation leaves
    possible in S(x): no point of it has a larger loss in eval mode, up to rounding. A forward and a
    backward pass of intervals, which cost about two of images, and one of each for the images.

    Bounds are those of the network as it predicts: BatchNorm with its running statistics, without
    dropout, and without noise that is for training. Those of an untrained network are so wide that
    training ends at the uniform output, unless radius and weight grow from 0 on, as in the paper:
    `training.curriculum.eps_warmup` with `training.curriculum.smooth`.

    Parameters
    ----------
    attack
        None: with an attack it is `MTLIBP`.
    norm
        linf alone: of the balls of other norms intervals know the box around them.
    eps
        Radius that bounds hold for, in pixel units, 0 or more. Larger than the one of the
        evaluation, it proves more there.
    weight
        Of the bounds, from 0 to 1.
    """

    attack: Attack
    norm: Norm = Norm.linf
    eps: float = 0.1
    weight: float = 0.5

    def __post_init__(self) -> None:
        ranges.at_least(0, eps=self.eps)
        ranges.within(0, 1, weight=self.weight)
        self.check_attack()

    def check_attack(self) -> None:
        """Raise `InputError` if there is an attack, which would make it another method."""
        name = type(self.attack).__name__
        allowed = "none: training on bounds and on adversarial images is defense=mtl_ibp"
        ranges.require(is_none(self.attack), "attack", name, allowed)

    def grown(self, share: float) -> "IBP":
        """With `share` of the weight, where `training.curriculum` has the radii grow."""
        return replace(self, weight=share * self.weight)

    def refuse_unfit(self, model: nn.Module, image_shape: tuple[int, int, int]) -> None:
        """Raise `InputError` in other norms, and if the bounds of `model` are not known.

        Only who trains asks for it: what this has trained may be evaluated in other norms.
        """
        refuse_unbounded(model, image_shape, self.norm, "defense=ibp or mtl_ibp")

    def inner(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator
    ) -> Tensor:
        """The images of the first loss."""
        return self.attack(model, x, y, generator=generator)

    def outer(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, loss: Loss
    ) -> Objective:
        """The mixed loss."""
        logits, worst = model(x_adv), self._worst(model, x, y)
        mixture = (1 - self.weight) * loss(logits, y) + self.weight * loss(worst, y)
        seen = "clean" if is_none(self.attack) else "adversarial"
        return Objective(mixture.mean(), **{seen: logits})

    def _worst(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with modes_restored(model):
            outputs = cast(Interval, model.eval()(Interval.around(x, self.eps)))
        return outputs.margins(each_row(y, outputs.centre))


@dataclass
class MTLIBP(IBP):
    """min E[ (1 - weight) L(f(adv(x)), y) + weight L(m(x), y) ] (De Palma et al. 2024, MTL-IBP).

    "Expressive losses for verified robustness via convex combinations", with alpha = weight: the
    adversarial images take the place of x in the first loss of `IBP`. All else is as there.

    Parameters
    ----------
    attack
        Any attack but none.
    """

    def check_attack(self) -> None:
        """Raise `InputError` if there is no attack, which would make it another method."""
        refuse_none(self.attack)
