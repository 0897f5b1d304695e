"""The Kullback-Leibler divergence of outputs, which TRADES and distillation have attacks climb."""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from robusttrain import ranges
from robusttrain.attacks import Attack, traits_of
from robusttrain.attacks.attack_loss import Label


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax of each row of `logits` (N, K), in float32 at least.

    Close distributions differ in digits that bf16 does not have.
    """
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)


def mean_log_probabilities(logits: Tensor, count: int) -> Tensor:
    """log of the mean softmax of `count` images, (count, K), each of which has as many rows."""
    draws = len(logits) // count
    rows = log_probabilities(logits).view(count, draws, -1)
    return rows.logsumexp(1) - math.log(draws)


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """KL(p || softmax(logits)) of each row, (N,), with log p = `target` (N, K)."""
    rows = F.kl_div(log_probabilities(logits), target, reduction="none", log_target=True)
    return rows.sum(1)


class DivergenceFrom:
    """A loss for attacks: how far outputs are from given ones, whatever the labels.

    Parameters
    ----------
    target
        Log-probabilities (N, K) of the images of the batch, constants.
    """

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        """KL(p || softmax(logits)) of each image, (N,)."""
        return divergence(self.target, logits)

    def take(self, rows: Tensor | slice) -> "DivergenceFrom":
        """The same loss for some of the images."""
        return DivergenceFrom(self.target[rows])


def refuse_labels(attack: Attack) -> None:
    """Raise `InputError` if `attack` leads to a label, or from another than the given one.

    A divergence knows no labels; where it is to fall, the images would not be adversarial.
    """
    label = traits_of(attack).label
    allowed = "given: the defense has its attack climb a divergence, which knows no labels"
    ranges.require(label == Label.given, "attack.label", label, allowed)


def refuse_start_at_image(attack: Attack) -> None:
    """Raise `InputError` if `attack` starts at x, where the divergence from f(x) has no slope."""
    allowed = "true: the divergence from the outputs at an image has no slope there"
    random_start = not traits_of(attack).starts_at_image
    ranges.require(random_start, "attack.random_start", random_start, allowed)
