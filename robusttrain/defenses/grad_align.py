"""GradAlign: FGSM training with a regulariser that keeps the network locally linear."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.attacks import Loss, ThreatFields, cross_entropy
from robusttrain.attacks.attack_loss import Label, attack_loss
from robusttrain.attacks.model_view import Mode, frozen
from robusttrain.defenses import Objective, each_row
from robusttrain.threat import Norm, check_lengths
from robusttrain.threat.balls import ball


class Points(NamedTuple):
    """The step of FGSM, and the points whose gradients are compared; (N, C, H, W) each.

    Parameters
    ----------
    x_adv
        Images at the end of the step.
    gradient
        Gradient of the loss at the clean images.
    noisy
        Images with noise, as a leaf that requires gradients.
    """

    x_adv: Tensor
    gradient: Tensor
    noisy: Tensor


@dataclass
class GradAlign(ThreatFields):
    """min E[ L(f(x + d), y) + weight (1 - cos(grad_x L(x), grad_x L(x + n))) ].

    Andriushchenko and Flammarion 2020: d is the step of FGSM, and n is uniform in the ball. The
    cosine falls when one step is no longer the worst case, that is, in catastrophic overfitting.
    The gradient at x also gives d, and is a constant of the objective. Both gradients are of the
    plain cross-entropy in train mode. Three forward passes, one input gradient, and one input
    gradient that is differentiated again. With `weight_perturbation=awp` the constant is still the
    gradient at the unperturbed weights.

    Parameters
    ----------
    norm, eps
        The threat model; `eps` in pixel units of [0, 1], 0 or more.
    weight
        Weight of the regulariser, 0 or more: lambda of the paper, 0.2 for CIFAR-10 at 8/255.
    """

    norm: Norm = Norm.linf
    eps: float = 8 / 255
    weight: float = 0.2

    def __post_init__(self) -> None:
        check_lengths(self.norm, eps=self.eps)
        ranges.at_least(0, weight=self.weight)

    def inner(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator
    ) -> Points:
        """The step of FGSM, its gradient, and noisy images."""
        threat = ball(self.threat)
        with frozen(model, Mode.train):
            own_loss = attack_loss(model, x, y, label=Label.given, loss=cross_entropy)
            gradient = own_loss.evaluate(x).gradient
        noisy = (x + threat.random_offset(x, generator)).requires_grad_()
        return Points(threat.linear_maximiser(gradient, x), gradient, noisy)

    def outer(
        self, model: nn.Module, x: Tensor, found: Points, y: Tensor, *, loss: Loss
    ) -> Objective:
        """The loss at the end of the step plus the weighted regulariser."""
        logits = model(found.noisy)
        losses = cross_entropy(logits, each_row(y, logits))
        (nearby,) = torch.autograd.grad(losses.sum(), found.noisy, create_graph=True)
        adversarial = model(found.x_adv)
        regulariser = self.weight * misalignment(found.gradient, nearby)
        return Objective(loss(adversarial, y).mean() + regulariser, adversarial=adversarial)


def misalignment(first: Tensor, second: Tensor) -> Tensor:
    """The mean over images of 1 - cos between two gradients (N, ...), a differentiable scalar.

    Images with a zero gradient have no angle and do not count.
    """
    directions = [_direction(gradient) for gradient in (first, second)]
    defined = (directions[0] != 0).any(1) & (directions[1] != 0).any(1)
    cosines = (directions[0] * directions[1]).sum(1)
    return ((1 - cosines) * defined).sum() / defined.sum().clamp_min(1)


def _direction(gradient: Tensor) -> Tensor:
    flat = gradient.flatten(1)
    # A confident model has tiny gradients, whose squares underflow unless scaled up first.
    largest = flat.detach().abs().amax(1, keepdim=True)
    return F.normalize(flat / largest.clamp_min(torch.finfo(flat.dtype).tiny), dim=1)
