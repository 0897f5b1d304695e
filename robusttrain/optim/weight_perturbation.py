"""Perturbations of weights, from which the loss is descended instead of from the weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.noise.layer import noise_layers

# The least norm that a slope is divided by; a zero slope then moves nothing.
LEAST = 1e-12


Offsets = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
"""(weights, the slopes of a batch's loss there) -> what is added to each of them for its step."""


class WeightPerturbation(Protocol):
    """Settings that say where the weights are moved to before a step is computed."""

    def at(self, progress: float) -> Offsets | None:
        """What moves them once `progress`, a share of the training, is over; None for nothing."""


@dataclass
class NoPerturbation:
    """Steps are computed where the weights are."""

    def at(self, progress: float) -> Offsets | None:
        """Nothing moves them."""
        return None


@dataclass
class AWP:
    """min_w max_{v in V} E[ J(w + v) ] for the objective J of any defense.

    Wu, Xia and Wang 2020: V holds the offsets with |v_l| <= gamma |w_l| in l2 for each weight
    tensor w_l, and v is one step of ascent from w with the adversarial images of J, that is,
    v_l = gamma |w_l| g_l / |g_l| with J's gradient g at w. The gradient at w + v then moves w.
    Biases and the scales of normalisation, tensors of one axis, stay, and so do the sizes of noise.
    J has the penalty of the noise, if there is one. A step costs a second computation of J, forward
    and backward.

    Parameters
    ----------
    gamma
        Size of the offset as a share of the weights' norm, 0 or more: 0.01 in the paper with
        `defense=madry`, 0.005 with `defense=trades`.
    warmup
        Share of the training, from 0 to 1, that goes without.
    """

    gamma: float = 0.01
    warmup: float = 0.0

    def __post_init__(self) -> None:
        ranges.at_least(0, gamma=self.gamma)
        ranges.within(0, 1, warmup=self.warmup)

    def at(self, progress: float) -> Offsets | None:
        """`offsets`, from the end of the warm-up on."""
        return self.offsets if progress >= self.warmup else None

    def offsets(self, weights: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Tensor]:
        """v of each tensor, of norm gamma |w|; 0 where there is no slope."""
        return [
            slope * (self.gamma * weight.norm() / slope.norm().clamp_min(LEAST))
            for weight, slope in zip(weights, slopes, strict=True)
        ]


@contextmanager
def perturbed(model: nn.Module, offsets: Offsets) -> Iterator[None]:
    """Let the weights of `model` be off by `offsets` in this block; their slopes are in `grad`.

    Afterwards its weights are bit for bit what they were, and so are its buffers: BatchNorm's
    running statistics are those of weights that stay.
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
        slopes = [weight.grad for weight in weights if weight.grad is not None]
        for weight, offset in zip(weights, offsets(weights, slopes), strict=True):
            weight.add_(offset)
    try:
        yield
    finally:
        with torch.no_grad():
            for value, own in zip(moved, before, strict=True):
                value.copy_(own)
