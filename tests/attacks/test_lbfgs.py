import math

import pytest
import torch
from torch import Tensor

from robusttrain.attacks.attack_loss import Label
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.lbfgs import LBFGS
from robusttrain.errors import InputError
from robusttrain.threat import Norm
from toys.attacks import Affine, everywhere, interior, tanh_network


def length(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1)


def test_finds_smaller_perturbations_than_one_step_of_the_full_radius() -> None:
    model, x = tanh_network(12, 3, gain=2.0), everywhere(24, 1, 3, 4)
    y = model(x).argmax(1)
    single, found = FGSM(eps=0.3)(model, x, y), LBFGS(eps=0.3, rounds=4)(model, x, y)
    both = (model(single).argmax(1) != y) & (model(found).argmax(1) != y)
    assert both.sum() >= 5
    assert (length(found - x)[both] <= length(single - x)[both] + 1e-9).all()
    assert length(found - x)[both].mean() < 0.8 * length(single - x)[both].mean()


def test_the_search_over_c_approaches_the_smallest_perturbation() -> None:
    """On a linear model it is |margin| / |w|, at the decision boundary."""
    model, x = Affine(2, 12), interior(8, 1, 3, 4)
    y = model(x).argmax(1)
    margin = (model(x)[:, 0] - model(x)[:, 1]).abs()
    smallest = margin / (model.weight[0] - model.weight[1]).norm()
    assert smallest.max() < 0.7
    lengths = []
    for rounds in (1, 6):
        x_adv = LBFGS(eps=0.4, c=1e-3, steps=40, rounds=rounds)(model, x, y)
        assert (model(x_adv).argmax(1) != y).all()
        assert (length(x_adv - x) >= smallest - 1e-9).all()
        lengths.append(length(x_adv - x))
    first, last = lengths
    assert (last <= first).all()
    assert last.mean() < 0.8 * first.mean()


@pytest.mark.parametrize("norm", list(Norm))
def test_a_targeted_search_raises_the_probability_of_its_class(norm: Norm) -> None:
    model, x = tanh_network(12, 4, gain=1.5), everywhere(10, 1, 3, 4)
    target = model(x).argmin(1, keepdim=True)
    attack = LBFGS(norm=norm, eps=0.3, label=Label.least_likely)
    x_adv = attack(model, x, model(x).argmax(1))
    before, after = (model(images).softmax(1).gather(1, target) for images in (x, x_adv))
    assert (after > before).all()


def test_the_images_of_a_batch_do_not_share_a_fate() -> None:
    """The batch is one problem for the solver, with one curvature; each image is still solved."""
    model, x = tanh_network(12, 3, gain=1.5), everywhere(6, 1, 3, 4)
    y = model(x).argmax(1)
    attack = LBFGS(eps=0.3, c=0.0, steps=100, rounds=1)
    together = attack(model, x, y)
    alone = torch.cat([attack(model, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    assert torch.equal(model(together).argmax(1) != y, model(alone).argmax(1) != y)


@pytest.mark.parametrize(
    ("key", "value"), [("c", -0.1), ("c", math.inf), ("steps", 0), ("rounds", 0)]
)
def test_impossible_settings_are_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{key}={value} "):
        LBFGS(**{key: value})


def test_the_search_over_c_closes_in_on_the_smallest_perturbation() -> None:
    """On a linear model the smallest l2 perturbation is the distance from the boundary."""
    model, x = Affine(2, 36).requires_grad_(False), interior(8, 1, 6, 6)
    logits = model(x)
    y = logits.argmax(1)
    gap = (logits[:, 0] - logits[:, 1]).abs()
    distance = gap / (model.weight[0] - model.weight[1]).norm()
    attack = LBFGS(
        norm=Norm.l2,
        eps=2 * float(distance.max()),
        label=Label.least_likely,
        steps=50,
        rounds=14,
    )
    x_adv = attack(model, x, y)
    assert (model(x_adv).argmax(1) != y).all()
    size = length(x_adv - x)
    assert (size >= distance * (1 - 1e-6)).all()
    assert (size <= 1.1 * distance).all()
