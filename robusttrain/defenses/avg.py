"""The mean over several balls: each image is trained on under every threat model."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robusttrain.attacks import Loss
from robusttrain.attacks.several_norms import AttackInSeveralNorms, searches
from robusttrain.defenses import Objective, each_row


@dataclass
class AVG(AttackInSeveralNorms):
    """min E[ 1/k sum_p max_{z in S_p(x)} L(f(z), y) ] (Tramer and Boneh 2019, "avg" strategy).

    AVG in Maini et al. 2020 is the same. The attack searches the ball of each of the k norms, and
    the results are constants of the outer gradient. k forward and k backward passes besides k times
    the passes of the attack.
    """

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
