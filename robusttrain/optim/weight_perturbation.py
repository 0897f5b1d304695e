"""Perturbations of the weights, at which the gradient of a step is computed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.noise.layer import noise_layers

# The smallest norm that a gradient is divided by, so that a zero gradient gives no offset.
MIN_NORM = 1e-12


Offsets = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
"""(weights, gradients of a batch's loss there) -> offsets that are added to the weights."""


class WeightPerturbation(Protocol):
    """Settings of the offsets at which the gradient of a step is computed."""

    def at(self, progress: float) -> Offsets | None:
        """The offsets after a share `progress` of the training; None for no perturbation."""


@dataclass
class NoPerturbation:
    """No perturbation: gradients are computed at the weights themselves."""

    def at(self, progress: float) -> Offsets | None:
        """Always None."""
        return None


@dataclass
class AWP:
    """min_w max_{v in V} E[ J(w + v) ] for the objective J of any defense.

    Wu, Xia and Wang 2020: V holds the offsets with |v_l| <= gamma |w_l| in l2 for each weight
    tensor w_l, and v is one step of ascent from w with the adversarial images of J, that is,
    v_l = gamma |w_l| g_l / |g_l| with J's gradient g at w. The step of w takes the gradient at
    w + v. Tensors of one axis (biases and scales of normalisation) and parameters of noise are not
    perturbed. J includes the penalty of the noise, if there is one. A step costs a second forward
    and backward computation of J.

    Parameters
    ----------
    gamma
        Norm of the offset as a share of the weights' norm, 0 or more: 0.01 in the paper with
        `defense=madry`, 0.005 with `defense=trades`.
    warmup
        Share of the training, from 0 to 1, without perturbation at its start.
    """

    gamma: float = 0.01
    warmup: float = 0.0

    def __post_init__(self) -> None:
        ranges.at_least(0, gamma=self.gamma)
        ranges.within(0, 1, warmup=self.warmup)

    def refuse_without_effect(self) -> None:
        """Raise `InputError` if the weights are never perturbed."""
        name = "otherwise, weight_perturbation=none"
        ranges.require(self.gamma > 0, "gamma", self.gamma, f"above 0; {name}")
        ranges.require(self.warmup < 1, "warmup", self.warmup, f"below 1; {name}")

    def at(self, progress: float) -> Offsets | None:
        """`offsets`, from the end of the warm-up on."""
        return self.offsets if progress >= self.warmup else None

    def offsets(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """v of each tensor, of norm gamma |w|; 0 where the gradient is 0."""
        return [
            gradient * (self.gamma * weight.norm() / gradient.norm().clamp_min(MIN_NORM))
            for weight, gradient in zip(weights, gradients, strict=True)
        ]


@contextmanager
def perturbed(model: nn.Module, offsets: Offsets) -> Iterator[None]:
    """Add `offsets` to the weights of `model` in this block; their gradients are in `grad`.

    After the block, the weights are bit for bit what they were, and so are the buffers: BatchNorm's
    running statistics must not include those of perturbed weights.
    """
    of_noise = {id(p) for layer in noise_layers(model) for p in layer.parameters()}
    weights = [
        weight
        for weight in model.parameters()
        if weight.dim() > 1 and weight.grad is not None and id(weight) not in of_noise
    ]
    moved = [*weights, *model.buffers()]
    before = [value.detach().clone() for value in moved]
    with torch.no_grad():
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        for weight, offset in zip(weights, offsets(weights, gradients), strict=True):
            weight.add_(offset)
    try:
        yield
    finally:
        with torch.no_grad():
            for value, own in zip(moved, before, strict=True):
                value.copy_(own)
