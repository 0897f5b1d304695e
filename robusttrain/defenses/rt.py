"""Robust Training by the closed form of its linearised worst case."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robusttrain.attacks import Loss, ThreatFields
from robusttrain.defenses import Defense, Objective
from robusttrain.threat import Norm, check_lengths
from robusttrain.threat.balls import ball


@dataclass
class RT(ThreatFields, Defense):
    """min E[ max_{e in S} L(f(x), y) + <grad_x L, e> ] = E[ L + eps |grad_x L|_dual ].

    Shaham, Yamada and Negahban 2018, section 4: the inner maximum over the ball is a dual norm of
    the input gradient, through which the backward pass differentiates. It agrees with
    `rt_perturbed`, the paper's algorithm, only to first order in `eps`. One forward pass, one input
    gradient, and one backward pass through both.

    With BatchNorm in train mode the outputs of an image depend on the whole batch. The input
    gradient is then that of the batch's summed loss.

    Parameters
    ----------
    norm, eps
        The threat model; `eps` in pixel units of [0, 1], 0 or more.
    """

    norm: Norm = Norm.linf
    eps: float = 8 / 255

    def __post_init__(self) -> None:
        check_lengths(self.norm, eps=self.eps)

    def outer(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, loss: Loss
    ) -> Objective:
        """The linearised worst-case loss."""
        point = x.detach().requires_grad_()
        logits = model(point)
        losses = loss(logits, y)
        (gradient,) = torch.autograd.grad(losses.sum(), point, create_graph=True)
        worst = losses + self.eps * ball(self.threat).dual_norm(gradient)
        return Objective(worst.mean(), clean=logits)
