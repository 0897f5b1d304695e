"""MART against the paper's formula in float64."""

import numpy as np
import pytest

from robusttrain.attacks import cross_entropy
from robusttrain.attacks.pgd import PGD
from robusttrain.defenses.mart import MART
from robusttrain.errors import InputError
from toys.defenses import Fixed, batch, gradients_are_right, logits, objective_of, softmax

NEARBY, _ = batch(seed=5)


def boosted(q: np.ndarray, y: np.ndarray) -> np.ndarray:
    """BCE: -log q_y - log(1.0001 - max_{k != y} q_k)."""
    rivals = [max(np.delete(row, own)) for row, own in zip(q, y, strict=True)]
    return np.asarray(-np.log(q[np.arange(len(q)), y]) - np.log(1.0001 - np.array(rivals)))


@pytest.mark.parametrize("beta", [0.0, 5.0])
def test_the_loss_is_the_formula(beta: float) -> None:
    x, y = batch()
    labels = y.numpy()
    p, q = softmax(logits(x)), softmax(logits(NEARBY))
    weighted = (p * np.log(p / q)).sum(1) * (1 - p[np.arange(len(p)), labels])
    expected = (boosted(q, labels) + beta * weighted).mean()
    objective = objective_of(MART(Fixed(NEARBY), beta))
    assert objective.loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_gradient_is_that_of_the_formula() -> None:
    assert gradients_are_right(MART(Fixed(NEARBY), 5.0))


def test_at_radius_zero_it_is_the_boosted_loss_alone() -> None:
    x, y = batch()
    objective = objective_of(MART(PGD(eps=0.0, steps=2)))
    expected = boosted(softmax(logits(x)), y.numpy()).mean()
    assert objective.loss.item() == pytest.approx(expected, rel=1e-9)


def test_the_attack_climbs_the_plain_loss() -> None:
    attack = Fixed(NEARBY)
    objective_of(MART(attack))
    assert attack.loss in (None, cross_entropy)


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(InputError, match=r"^beta=-1 is not allowed"):
        MART(PGD(), -1)
