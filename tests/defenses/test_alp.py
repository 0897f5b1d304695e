"""Logit pairing in closed form, both kinds."""

from typing import Any

import numpy as np
import pytest
import torch

from robusttrain.attacks.pgd import PGD
from robusttrain.defenses.alp import ALP
from robusttrain.errors import InputError
from toys.defenses import (
    Array,
    Fixed,
    asked,
    batch,
    gradients_are_right,
    logits,
    network,
    objective_of,
    softmax,
)

NEARBY, _ = batch(seed=5)


def mean_loss(values: Array, y: Array) -> float:
    return float(-np.log(softmax(values)[np.arange(len(values)), y]).mean())


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_adversarial_pairs(weight: float) -> None:
    x, y = batch()
    clean, adversarial = logits(x), logits(NEARBY)
    mixture = (mean_loss(clean, y.numpy()) + mean_loss(adversarial, y.numpy())) / 2
    expected = mixture + weight * ((clean - adversarial) ** 2).mean()
    objective = objective_of(ALP(Fixed(NEARBY), weight))
    assert objective.loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_clean_pairs(count: int) -> None:
    """A single remaining image has no pair, and the attack is never called."""
    x, y = (part[:count] for part in batch())
    values, half = logits(x), count // 2
    apart = [((values[i] - values[i + half]) ** 2).mean() for i in range(half)]
    expected = mean_loss(values, y.numpy()) + 0.7 * (np.mean(apart) if apart else 0)
    attack = Fixed(torch.empty(0))
    defense = ALP(attack, 0.7, "clean")
    objective = asked(defense, network(), x, y)
    assert objective.loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("pairing", ["adversarial", "clean"])
def test_the_gradient_goes_through_both_logits(pairing: Any) -> None:
    assert gradients_are_right(ALP(Fixed(NEARBY), 0.5, pairing))


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"^weight=-1 is not allowed"):
        ALP(PGD(), -1)
    with pytest.raises(InputError, match=r"^pairing=none is not allowed"):
        ALP(PGD(), pairing="none")
