"""GradAlign: FGSM training of a network that is held to be locally linear."""

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
from robusttrain.threat import Norm
from robusttrain.threat.balls import ball


class Points(NamedTuple):
    """The step of FGSM, and the points between which gradients are compared; (N, C, H, W) each.

    Parameters
    ----------
    x_adv
        Images at the end of the step.
    gradient
        That of the loss at the images themselves.
    noisy
        Images with noise; a leaf that requires gradients.
    """

    x_adv: Tensor
    gradient: Tensor
    noisy: Tensor


@dataclass
class GradAlign(ThreatFields):
    """min E[ L(f(x + d), y) + weight (1 - cos(grad_x L(x), grad_x L(x + n))) ].

    Andriushchenko and Flammarion 2020: d is the step of FGSM, n uniform in the ball, and the
    cosine falls where one step stops being the worst case, that is, in catastrophic overfitting.
    The gradient at x also gives d and is a constant of the objective; both gradients are of the
    plain cross-entropy in train mode. Three forward passes, one input gradient alone, and one that
    is differentiated through. With `weight_perturbation=awp` the constant stays the gradient at the
    weights themselves.

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
        ranges.at_least(0, eps=self.eps, weight=self.weight)

    def inner(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator
    ) -> Points:
        """The step of FGSM, its gradient, and noisy images."""
        threat = ball(self.threat)
        with frozen(model, Mode.train):
            surrogate = attack_loss(model, x, y, label=Label.given, loss=cross_entropy)
            gradient = surrogate.evaluate(x).gradient
        noisy = (x + threat.random_offset(x, generator)).requires_grad_()
        return Points(threat.linear_maximiser(gradient, x), gradient, noisy)

    def outer(
        self, model: nn.Module, x: Tensor, found: Points, y: Tensor, *, loss: Loss
    ) -> Objective:
        """The loss at the end of the step, and the weighted regulariser."""
        logits = model(found.noisy)
        losses = cross_entropy(logits, each_row(y, logits))
        (nearby,) = torch.autograd.grad(losses.sum(), found.noisy, create_graph=True)
        adversarial = model(found.x_adv)
        bent = self.weight * misalignment(found.gradient, nearby)
        return Objective(loss(adversarial, y).mean() + bent, adversarial=adversarial)


def misalignment(first: Tensor, second: Tensor) -> Tensor:
    """1 - cos between the gradients (N, ...) of each image, on average; differentiable.

    Images of which one gradient is zero have no angle and do not count.
    """
    directions = [_direction(gradient) for gradient in (first, second)]
    known = (directions[0] != 0).any(1) & (directions[1] != 0).any(1)
    cosines = (directions[0] * directions[1]).sum(1)
    return ((1 - cosines) * known).sum() / known.sum().clamp_min(1)


def _direction(gradient: Tensor) -> Tensor:
    flat = gradient.flatten(1)
    # A confident model has faint gradients, whose squares underflow unless scaled up first.
    largest = flat.detach().abs().amax(1, keepdim=True)
    return F.normalize(flat / largest.clamp_min(torch.finfo(flat.dtype).tiny), dim=1)
