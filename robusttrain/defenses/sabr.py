"""Training on the bounds of a small box around an adversarial image."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.attacks import Loss, states_threat, threat_of, under
from robusttrain.attacks.none import refuse_none
from robusttrain.bounds.intervals import Interval
from robusttrain.defenses.bounded import BoundDefense


@dataclass
class SABR(BoundDefense):
    """min E[ L(m(adv(x)), y) ], m the bounds of a small box (Mueller et al. 2023, SABR).

    "Certified training: small boxes are all you need". The attack searches the ball of radius
    (1 - box_share) r around x, with r = `eps + eps_margin`. m are the worst logits that interval
    bounds leave possible in the box of radius box_share * r around its result. That box is inside
    of S(x) with radius r. The larger the box, the more is proven, and the fewer images are
    classified correctly. `box_share=1` would be `IBP` with weight 1.

    A pass of intervals forward and back, the passes of the attack, and one forward pass of the
    clean images, for the accuracy on them and the statistics of BatchNorm.

    Parameters
    ----------
    attack
        Any attack but none that states its threat model. Its own radius has no effect.
    norm, eps, eps_margin, statistics, regularisation
        As for `IBP`.
    box_share
        Radius of the box as a share of the whole radius, from 0 to 1 (the paper's lambda). The
        paper has 0.4 for MNIST at 0.1, and 0.6 at 0.3.
    """

    box_share: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.within(0, 1, box_share=self.box_share)

    def check_attack(self) -> None:
        """Raise `InputError` if there is no attack, or if its radius cannot be set."""
        refuse_none(self.attack)
        allowed = "one that states its threat model (attacks.Bounded), since its ball is shrunk"
        name = type(self.attack).__name__
        ranges.require(states_threat(self.attack), "attack", name, allowed)

    def refuse_without_effect(self) -> None:
        """Raise `InputError` if the box is that of `IBP`, so that the attack has no effect."""
        allowed = "below 1; otherwise, defense=ibp defense.weight=1"
        ranges.require(self.box_share < 1, "box_share", self.box_share, allowed)

    def inner(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator
    ) -> Tensor:
        """The centres of the boxes, (N, C, H, W)."""
        threat = threat_of(self.attack)
        assert threat is not None, "an attack without a threat model was refused"
        shrunk = under(self.attack, threat.at((1 - self.box_share) * self.radius))
        return shrunk(model, x, y, generator=generator)

    def images(self, x: Tensor, found: Tensor) -> Tensor:
        """The clean images."""
        return x

    def box(self, x: Tensor, found: Tensor) -> Interval:
        """The small box around the adversarial image."""
        return Interval.around(found, self.box_share * self.radius)

    def combined(self, logits: Tensor, worst: Tensor, y: Tensor, loss: Loss) -> Tensor:
        """The loss at the bounds alone."""
        return loss(worst, y)
