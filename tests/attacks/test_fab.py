"""FAB on linear models, where the nearest point of another class is known in closed form."""

import math

import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks.fab import FAB
from robusttrain.attacks.square import Square
from robusttrain.errors import InputError
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball
from toys.attacks import Affine, OnFirstPixel, everywhere, generator, interior, tanh_network

DUAL_ORDER = {Norm.linf: 1, Norm.l2: 2, Norm.l1: float("inf")}
every_norm = pytest.mark.parametrize("norm", list(Norm))
every_aim = pytest.mark.parametrize("targets", [None, 3])


def nearest(model: Affine, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
    """The distance to the nearest other class: min over classes of margin / |w|_dual, (N,)."""
    logits = model(x)
    leads = logits.gather(1, y[:, None]) - logits
    slopes = torch.linalg.vector_norm(
        model.weight[y][:, None] - model.weight, ord=DUAL_ORDER[norm], dim=2
    )
    return torch.where(slopes > 0, leads / slopes, torch.inf).amin(1).detach()


def centred(classes: int) -> tuple[Affine, Tensor, Tensor]:
    """A linear model whose logits are near each other, images inside the box, and right labels."""
    model, x = Affine(classes, 48), interior(32, 3, 4, 4)
    model.bias.data -= model(x).detach().mean(0)
    return model, x, model(x).argmax(1)


@every_aim
@every_norm
def test_the_smallest_perturbation_is_found(norm: Norm, targets: int | None) -> None:
    """Each target has its plane; without targets the two best classes have theirs."""
    model, x, y = centred(4 if targets else 2)
    exact = nearest(model, x, y, norm)
    # The ball holds all of them, and the box is out of reach.
    attack = FAB(norm=norm, eps=1.5 * exact.max().item(), targets=targets, minimal=True)
    x_adv = attack(model, x, y, generator=generator())
    assert x_adv.min() > 0
    assert x_adv.max() < 1
    assert (model(x_adv).argmax(1) != y).all()
    size = ball(Threat(norm, 1.0)).norm(x_adv - x)
    assert (size >= exact * (1 - 1e-9)).all()
    assert (size <= 1.05 * exact).all()


@pytest.mark.parametrize("give_up", [True, False])
@pytest.mark.parametrize("minimal", [True, False])
@every_aim
@every_norm
def test_exactly_the_images_that_can_be_fooled_are_fooled(
    norm: Norm, targets: int | None, minimal: bool, give_up: bool
) -> None:
    """Giving up early loses none."""
    model, x, y = centred(4 if targets else 2)
    exact = nearest(model, x, y, norm)
    eps = exact.median().item() * 1.01
    settings = {"targets": targets, "minimal": minimal, "give_up": give_up}
    attack = FAB(norm=norm, eps=eps, steps=40, **settings)
    x_adv = attack(model, x, y, generator=generator())
    assert (ball(Threat(norm, eps)).norm(x_adv - x) <= eps * (1 + 1e-9)).all()
    fooled = model(x_adv).argmax(1) != y
    assert torch.equal(
        fooled[(exact / eps - 1).abs() > 0.01], (exact < eps)[(exact / eps - 1).abs() > 0.01]
    )
    assert 0 < fooled.sum() < len(x)


@every_norm
def test_the_box_is_part_of_the_way(norm: Norm) -> None:
    """The shortest way within the box to the plane of a linear model."""
    model, x = Affine(2, 48), everywhere(32, 3, 4, 4)
    model.bias.data -= model(x).detach().mean(0)
    y = model(x).argmax(1)
    lead = (model(x)[:, 1] - model(x)[:, 0]).detach()
    slope = (model.weight[1] - model.weight[0]).detach().view_as(x[:1]).expand_as(x)
    size = ball(Threat(norm, 1.0)).norm
    exact = size(ball(Threat(norm, 1.0)).shortest_way(slope, -lead, x))
    x_adv = FAB(norm=norm, eps=1.5 * exact.max().item(), minimal=True)(model, x, y)
    assert (model(x_adv).argmax(1) != y).all()
    assert (size(x_adv - x) <= 1.05 * exact).all()
    assert (size(x_adv - x) >= exact * (1 - 1e-6)).all()


def passes(attack: FAB, model: nn.Module, x: Tensor, y: Tensor) -> list[int]:
    """How many images each pass has."""
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    attack(model, x, y, generator=generator())
    handle.remove()
    return sizes


@every_norm
def test_a_search_that_is_far_from_the_ball_ends(norm: Norm) -> None:
    """On linear models the first step has the smallest perturbation, which is 2 eps here."""
    model, x, y = centred(2)
    eps = nearest(model, x, y, norm).min().item() / 2
    attack = FAB(norm=norm, eps=eps, steps=50, give_up=True)
    assert len(passes(attack, model, x, y)) == 2 * 10
    assert len(passes(FAB(norm=norm, eps=eps, steps=50, give_up=False), model, x, y)) == 2 * 50


@every_norm
def test_only_in_linf_searches_give_up_by_themselves(norm: Norm) -> None:
    assert FAB(norm=norm).give_up == (norm is Norm.linf)
    assert Square(norm=norm).give_up == (norm is Norm.linf)


def test_giving_up_is_told_by_the_share_of_the_steps_and_the_size() -> None:
    """One image a size, in radii; each is given up at its own step."""
    model = OnFirstPixel(lambda t: [0 * t, t - 0.2])
    x = 0.7 - 0.1 * torch.tensor([1.4, 1.2, 1.08], dtype=torch.float64).view(3, 1, 1, 1)
    y = torch.zeros(3, dtype=torch.int64)
    # No overshoot: the boundary itself is what is found, and it belongs to class 1 by rounding.
    sizes = passes(FAB(eps=0.1, steps=100, eta=1.001), model, x, y)
    assert [sizes.count(n) // 2 for n in (3, 2, 1)] == [20, 15, 25]


@every_norm
def test_an_image_is_let_go_when_it_is_fooled_within_the_ball(norm: Norm) -> None:
    model, x, y = centred(2)
    eps = 2 * nearest(model, x, y, norm).max().item()
    assert len(passes(FAB(norm=norm, eps=eps), model, x, y)) == 2
    assert len(passes(FAB(norm=norm, eps=eps, minimal=True), model, x, y)) == 200


def test_restarts_and_targets_have_a_search_each() -> None:
    model, x, y = centred(4)
    attack = FAB(eps=1e-6, steps=5, targets=3, restarts=2, give_up=False)
    assert len(passes(attack, model, x, y)) == 1 + 3 * 2 * 5 * 2


def test_restarts_find_what_is_behind_a_ridge() -> None:
    """From x itself all slopes lead to the right, where nothing is to be found."""

    def logits(t: Tensor) -> list[Tensor]:
        return [0 * t, torch.where(t < -0.1, -t - 0.2, 0.01 * t - 0.1)]

    model = OnFirstPixel(logits)
    x, y = torch.full((16, 1, 1, 1), 0.5, dtype=torch.float64), torch.zeros(16, dtype=torch.int64)
    once, often = (FAB(eps=0.3, steps=5, restarts=n, give_up=False) for n in (1, 30))
    assert (model(once(model, x, y, generator=generator())).argmax(1) == y).all()
    assert (model(often(model, x, y, generator=generator())).argmax(1) != y).all()


@every_norm
def test_nonlinear_models_are_fooled_by_small_perturbations(norm: Norm) -> None:
    """No larger than the smallest one that a line search in random directions finds."""
    network, x = tanh_network(12, 3), everywhere(16, 1, 3, 4)
    y, threat = network(x).argmax(1), ball(Threat(norm, 1.0))
    eps = {Norm.linf: 0.3, Norm.l2: 1.0, Norm.l1: 3.0}[norm]
    x_adv = FAB(norm=norm, eps=eps, minimal=True)(network, x, y)
    fooled = network(x_adv).argmax(1) != y
    assert fooled.sum() > 8
    for seed in range(50):
        towards = ball(Threat(norm, eps)).random_start(x, generator(seed))
        for share in torch.linspace(0, 1, 20):
            tried = x + share * (towards - x)
            shorter = threat.norm(tried - x) < 0.999 * threat.norm(x_adv - x)
            assert not (fooled & shorter & (network(tried).argmax(1) != y)).any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"restarts": 0},
        {"alpha_max": -0.1},
        {"alpha_max": 1.1},
        {"eta": 0.99},
        {"beta": 0.0},
        {"beta": 1.0},
        {"beta": math.nan},
    ],
)
def test_impossible_settings_are_refused_by_name(wrong: dict[str, float]) -> None:
    ((key, value),) = wrong.items()
    with pytest.raises(InputError, match=f"^{key}={value} "):
        FAB(**wrong)
