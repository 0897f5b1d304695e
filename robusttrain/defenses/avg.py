"""The mean over several balls: each image is trained on under every threat model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robusttrain.attacks import Attack, Loss
from robusttrain.attacks.several_norms import SeveralNorms, searches
from robusttrain.defenses import Objective, each_row


@dataclass
class AVG(SeveralNorms):
    """min E[ 1/k sum_p max_{z in S_p(x)} L(f(z), y) ] (Tramer and Boneh 2019, "avg" strategy).

    AVG in Maini et al. 2020 is the same. The attack searches the ball of each of the k norms, and
    the results are constants of the outer gradient. k forward and k backward passes besides k times
    the passes of the attack.

    Parameters
    ----------
    attack
        Any attack but none, which gets the threat models of `threats` in place of its own.
    threats
        The radii of two norms or more, in pixel units of [0, 1].
    """

    attack: Attack
    threats: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check_threats()
        searches(self.attack, self.threats)

    def inner(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator
    ) -> list[Tensor]:
        """Adversarial images (N, C, H, W) for each norm."""
        each = searches(self.attack, self.threats)
        return [search(model, x, y, generator=generator) for search in each]

    def outer(
        self, model: nn.Module, x: Tensor, found: list[Tensor], y: Tensor, *, loss: Loss
    ) -> Objective:
        """The mean of the losses; of each image, the logits of the highest one."""
        logits = torch.stack([model(x_adv) for x_adv in found])
        losses = torch.stack([loss(each, y) for each in logits])
        worst = each_row(losses.argmax(0), logits[0])
        adversarial = logits[worst, torch.arange(len(worst), device=worst.device)]
        return Objective(losses.mean(), adversarial=adversarial)
