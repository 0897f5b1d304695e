"""FMN and DDN against the smallest perturbations of linear models, which are known."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robusttrain.attacks.ddn import DDN
from robusttrain.attacks.fab import FAB
from robusttrain.attacks.fmn import FMN
from robusttrain.attacks.minimum_norm import annealed
from robusttrain.errors import InputError
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball
from toys.attacks import Affine, everywhere, generator, interior, tanh_network

ANYWHERE = {Norm.linf: 1.0, Norm.l2: 100.0, Norm.l1: 100.0}
IMAGES = {"away from the box": interior, "at the box": everywhere}
every_norm = pytest.mark.parametrize("norm", list(Norm))


def smallest(model: Affine, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
    """The size of the smallest perturbation within the box that reaches another class, (N,).

    It is the shortest way to the nearest of the planes where two logits are equal.
    """
    logits, sizes = model(x).detach(), []
    for k in range(logits.shape[1]):
        slope = (model.weight[k] - model.weight[y]).view_as(x).detach()
        gain = logits.gather(1, y[:, None])[:, 0] - logits[:, k]
        way = ball(Threat(norm, 0)).shortest_way(slope, gain, x)
        reached = (slope * way).flatten(1).sum(1) >= gain - 1e-9
        size = ball(Threat(norm, 0)).norm(way)
        sizes.append(torch.where(reached & (y != k), size, torch.inf))
    return torch.stack(sizes).amin(0)


def gentle(classes: int, images: str) -> tuple[Affine, Tensor, Tensor]:
    """A linear model, and images near to its boundaries."""
    model, x = Affine(classes, 12), IMAGES[images](16, 1, 3, 4)
    with torch.no_grad():
        model.bias.copy_(0.2 * model.bias - model.weight.sum(1) / 2)
    return model, x, model(x).argmax(1)


@every_norm
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("images", IMAGES)
def test_fmn_finds_the_smallest_perturbation_of_a_linear_model(
    images: str, classes: int, norm: Norm
) -> None:
    model, x, y = gentle(classes, images)
    attack = FMN(norm=norm, eps=ANYWHERE[norm], targets=classes - 1)
    x_adv = attack(model, x, y)
    assert (model(x_adv).argmax(1) != y).all()
    ratio = ball(Threat(norm, 0)).norm(x_adv - x) / smallest(model, x, y, norm)
    assert ratio.max() < 1.01
    assert ratio.min() > 1 - 1e-6


@pytest.mark.parametrize("images", IMAGES)
def test_ddn_finds_the_smallest_perturbation_between_two_classes(images: str) -> None:
    model, x, y = gentle(2, images)
    x_adv = DDN(eps=100.0, steps=500)(model, x, y)
    assert (model(x_adv).argmax(1) != y).all()
    ratio = ball(Threat(Norm.l2, 0)).norm(x_adv - x) / smallest(model, x, y, Norm.l2)
    assert ratio.max() < 1.01
    assert ratio.min() > 1 - 1e-6


@every_norm
def test_a_ball_that_holds_the_way_is_as_good_as_none_and_a_smaller_one_cuts_it(norm: Norm) -> None:
    model, x, y = gentle(3, "away from the box")
    exact = smallest(model, x, y, norm)
    eps = float(exact.median()) * 1.05
    x_adv = FMN(norm=norm, eps=eps, targets=2)(model, x, y)
    assert torch.equal(model(x_adv).argmax(1) != y, exact < eps)
    assert (ball(Threat(norm, 0)).norm(x_adv - x) <= eps + 1e-9).all()


@every_norm
def test_on_a_curved_network_fmn_is_near_what_fab_finds(norm: Norm) -> None:
    """Two searches of different kinds agree on the typical size within a few percent."""
    network, x = tanh_network(12, 3), interior(24, 1, 3, 4)
    y = network(x).argmax(1)
    sizes = []
    for attack in (
        FMN(norm=norm, eps=ANYWHERE[norm], targets=2),
        FAB(norm=norm, eps=ANYWHERE[norm], targets=2, minimal=True),
    ):
        x_adv = attack(network, x, y, generator=generator())
        assert (network(x_adv).argmax(1) != y).all()
        sizes.append(ball(Threat(norm, 0)).norm(x_adv - x))
    assert float((sizes[0] / sizes[1]).median()) == pytest.approx(1, abs=0.05)


@every_norm
@given(seed=st.integers(0, 2**32 - 1))
def test_each_image_is_projected_as_on_a_ball_of_its_own(norm: Norm, seed: int) -> None:
    draws = generator(seed)
    x, far = everywhere(3, 1, 3, 4, seed=seed), torch.randn(3, 1, 3, 4, generator=draws).double()
    radius = torch.rand(3, generator=draws).double()
    together = ball(Threat(norm, 0)).project_each(x + far, x, radius)
    for row, eps in enumerate(radius.tolist()):
        alone = ball(Threat(norm, eps)).project(
            x[row : row + 1] + far[row : row + 1], x[row : row + 1]
        )
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-6)


def test_a_cosine_falls_from_the_first_value_to_the_last() -> None:
    assert annealed(1.0, 0.1, 0, 10) == 1.0
    assert annealed(1.0, 0.1, 5, 10) == pytest.approx(0.55)
    assert annealed(1.0, 0.1, 10, 10) == pytest.approx(0.1)
    assert annealed(1.0, 0.1, 2, 10) == pytest.approx(0.1 + 0.45 * (1 + math.cos(0.2 * math.pi)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"norm": Norm.linf, "eps": 0.1}, "norm=linf is not allowed: .*l2"),
        ({"gamma": 1.0}, "gamma=1.0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"first_norm": 0.0}, "first_norm=0.0"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_settings_of_ddn_that_make_no_sense_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DDN(**keys)
