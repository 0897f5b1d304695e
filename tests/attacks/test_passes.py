"""What each attack costs: forward passes, backward passes, and no weight gradient at all."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks.attack_loss import Label
from robusttrain.attacks.ball_attack import BallAttack
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.lbfgs import LBFGS
from robusttrain.attacks.pgd import PGD
from robusttrain.attacks.softmax_linearisation import SoftmaxLinearisation
from robusttrain.attacks.uniform import Uniform
from toys.attacks import ATTACKS, everywhere, generator

CLASSES = 4


class Counted(torch.autograd.Function):
    """x @ weight.T that counts its backward passes, to the input and to the weight apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: "Counts") -> Tensor:
        ctx.save_for_backward(weight)
        ctx.counts = counts
        counts.forward += 1
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (weight,) = ctx.saved_tensors
        ctx.counts.to_input += ctx.needs_input_grad[0]
        ctx.counts.to_weight += ctx.needs_input_grad[1]
        return gradient @ weight, torch.zeros_like(weight), None


@dataclass
class Counts:
    forward: int = 0
    to_input: int = 0
    to_weight: int = 0


class CountedLinear(nn.Module):
    """A linear model that is so sure of class 0 that no attack here gets done early."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(CLASSES, 12, generator=generator())
        self.weight = nn.Parameter(weight)
        self.register_buffer("bias", torch.tensor([20.0, 0, 0, 0]))
        self.counts = Counts()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = Counted.apply(x.flatten(1), self.weight, self.counts) + self.bias
        return logits


def cost(attack: BallAttack) -> Counts:
    model = CountedLinear()
    x = everywhere(5, 1, 3, 4, dtype=torch.float32)
    attack(model, x, torch.zeros(5, dtype=torch.int64), generator=generator())
    return model.counts


@pytest.mark.parametrize(
    ("attack", "forward", "backward"),
    [
        (FGSM(), 1, 1),
        (FGSM(random_start=True), 1, 1),
        (FGSM(label=Label.predicted), 2, 1),
        (FGSM(label=Label.least_likely), 2, 1),
        (PGD(steps=1), 1, 1),
        (PGD(steps=7), 7, 7),
        (PGD(steps=7, random_start=False), 7, 7),
        (PGD(steps=7, keep_best=True), 8, 7),
        (PGD(steps=7, restarts=3), 24, 21),
        (SoftmaxLinearisation(), 1, CLASSES),
        (Uniform(), 0, 0),
    ],
    ids=str,
)
def test_passes(attack: BallAttack, forward: int, backward: int) -> None:
    counts = cost(attack)
    assert (counts.forward, counts.to_input) == (forward, backward)


def test_lbfgs_scores_every_round_once_and_pays_both_passes_in_the_solver() -> None:
    counts = cost(LBFGS(steps=5, rounds=3))
    assert counts.forward == counts.to_input + 3
    assert counts.to_input >= 3


@pytest.mark.parametrize("name", list(ATTACKS))
def test_no_weight_gradient_is_computed(name: str) -> None:
    """Trap 2: they would be added to those of the training step, and cost a third more."""
    model = CountedLinear()
    fired = []
    model.weight.register_hook(lambda gradient: fired.append(gradient))
    x = everywhere(5, 1, 3, 4, dtype=torch.float32)
    ATTACKS[name](eps=0.1)(model, x, torch.zeros(5, dtype=torch.int64), generator=generator())
    assert model.counts.to_weight == 0
    assert not fired
    assert model.weight.grad is None
    # The counter itself works.
    model(x).sum().backward()
    assert model.counts.to_weight == 1
    assert len(fired) == 1
