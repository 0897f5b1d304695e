"""The Kullback-Leibler divergence of outputs, which attacks climb for TRADES and distillation."""

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from robusttrain import ranges
from robusttrain.attacks import Attack, parts, traits_of
from robusttrain.attacks.attack_loss import Label


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax of each row of `logits` (N, K), in at least float32.

    bf16 has too few digits to tell close distributions apart.
    """
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)


def mean_log_probabilities(logits: Tensor, count: int) -> Tensor:
    """Log of each image's mean softmax, (count, K), over its equal number of rows in `logits`."""
    draws = len(logits) // count
    rows = log_probabilities(logits).view(count, draws, -1)
    return rows.logsumexp(1) - math.log(draws)


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """KL(p || softmax(logits)) of each row, (N,), with log p = `target` (N, K)."""
    rows = F.kl_div(log_probabilities(logits), target, reduction="none", log_target=True)
    return rows.sum(1)


class DivergenceFrom:
    """A loss for attacks: the divergence of outputs from given ones. Labels are ignored.

    Parameters
    ----------
    target
        Log-probabilities (N, K) for the images of the batch, as constants.
    """

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        """KL(p || softmax(logits)) of each image, (N,), with log p = `target`."""
        return divergence(self.target, logits)

    def take(self, rows: Tensor | slice) -> "DivergenceFrom":
        """The same loss for the images at `rows`."""
        return DivergenceFrom(self.target[rows])


def refuse_labels(attack: Attack) -> None:
    """Raise `InputError` if `attack` is targeted, or moves away from another label than the given.

    A divergence does not depend on labels. An attack that lowers it would find no adversarial
    images.
    """
    label = traits_of(attack).label
    allowed = "given: the attack of this defense climbs a divergence, which ignores labels"
    ranges.require(label == Label.given, "attack.label", label, allowed)


def refuse_own_objective(attack: Attack) -> None:
    """Raise `InputError` if `attack`, or the one inside of it, does not climb the divergence."""
    searching: Any = parts(attack)[-1]
    allowed = "one that climbs the divergence of this defense, and no objective of its own"
    own = traits_of(searching).own_objective
    ranges.require(not own, "attack", type(searching).__name__, allowed)


def refuse_start_at_image(attack: Attack) -> None:
    """Raise `InputError` if `attack` starts at x, where the divergence from f(x) has gradient 0."""
    allowed = "true: the divergence from the outputs at an image has gradient 0 there"
    random_start = not traits_of(attack).starts_at_image
    ranges.require(random_start, "attack.random_start", random_start, allowed)
