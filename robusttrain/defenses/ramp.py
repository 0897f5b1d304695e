"""The logit pairing of RAMP: one prediction at the adversarial images of two norms."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.attacks import Loss, under
from robusttrain.attacks.model_view import predictions
from robusttrain.attacks.several_norms import AttackInSeveralNorms
from robusttrain.defenses import Objective, each_row
from robusttrain.defenses.divergence import divergence, log_probabilities


@dataclass
class RAMP(AttackInSeveralNorms):
    """min E[ max_p L(f(z_p), y) ] + weight E[ KL(f(z_s) || f(z_t)) | f(z_s) has class y ].

    The attack finds z_t in the innermost ball of the same radius (l1) and z_s in the outermost
    (linf), and p is one of the two. The divergence of softmax outputs pulls the prediction at z_t
    towards that at z_s, where that is right (Jiang and Singh 2024, "RAMP: boosting adversarial
    robustness against multiple lp perturbations", logit pairing). Gradients go through both; z_s
    and z_t are constants of the outer gradient. Two forward and two backward passes besides twice
    the passes of the attack. RAMP's second part, which projects gradients of training on clean
    images, is left out.

    Parameters
    ----------
    weight
        Weight of the divergence, 0 or more. The authors use 5 for training from scratch.
    """

    weight: float = 5.0

    def __post_init__(self) -> None:
        ranges.at_least(0, weight=self.weight)
        super().__post_init__()

    def inner(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator
    ) -> list[Tensor]:
        """Adversarial images (N, C, H, W) in the innermost and in the outermost ball."""
        each = [under(self.attack, threat) for threat in self.extremes]
        return [search(model, x, y, generator=generator) for search in each]

    def outer(
        self, model: nn.Module, x: Tensor, found: list[Tensor], y: Tensor, *, loss: Loss
    ) -> Objective:
        """The higher loss of each image, and the divergence; the logits of the higher loss."""
        target, source = (model(x_adv) for x_adv in found)
        at_target, at_source = loss(target, y), loss(source, y)
        right = predictions(source.detach()) == each_row(y, source)
        pull = divergence(log_probabilities(source), target)
        pairing = pull.where(right, 0).sum() / right.sum().clamp_min(1)
        is_worse = each_row((at_target > at_source)[:, None], target)
        worse = torch.where(is_worse, target, source)
        total = torch.maximum(at_target, at_source).mean() + self.weight * pairing
        return Objective(total, adversarial=worse)
