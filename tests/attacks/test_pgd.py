"""PGD against a plain reference in NumPy, and the guarantees of restarts."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn

from robusttrain.attacks.pgd import PGD
from robusttrain.errors import InputError
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball
from toys.attacks import (
    OnFirstPixel,
    everywhere,
    generator,
    loss_gradient,
    misleading,
    pixel_images,
    reference_projection,
    reference_step,
    tanh_network,
)


@pytest.mark.parametrize("given_step", [True, False])
@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize(("norm", "eps"), [(Norm.linf, 0.1), (Norm.l2, 0.8), (Norm.l1, 5.0)])
def test_iterates_are_those_of_the_plain_reference(
    norm: Norm, eps: float, random_start: bool, given_step: bool
) -> None:
    steps, network, x = 7, tanh_network(300, 4, gain=1.5), everywhere(4, 3, 10, 10)
    y = torch.tensor([0, 1, 2, 3])
    step = eps / 3 if given_step else None
    attack = PGD(norm=norm, eps=eps, steps=steps, step_size=step, random_start=random_start)
    x_adv = attack(network, x, y, generator=generator(3))
    start = ball(Threat(norm, eps)).random_start(x, generator(3)) if random_start else x
    length = eps / 3 if given_step else 2.5 * eps / 7
    for i in range(len(x)):
        centre, z = x[i].flatten().numpy(), start[i].flatten().numpy()
        for _ in range(steps):
            g = loss_gradient(network, z, int(y[i]))
            z = reference_projection(norm, z + length * reference_step(norm, g, z), centre, eps)
        assert np.allclose(x_adv[i].flatten().numpy(), z, rtol=0, atol=1e-9)


def test_restarts_keep_any_point_that_fools_not_the_one_of_highest_loss() -> None:
    """Trap 3."""
    model, (x, y) = OnFirstPixel(misleading), pixel_images(64)
    once = PGD(eps=0.3, steps=5)(model, x, y, generator=generator())
    fooled_once = model(once).argmax(1) != 0
    assert 0 < fooled_once.sum() < 64
    losses = nn.functional.cross_entropy(model(once), y, reduction="none")
    assert losses[fooled_once].max() < losses[~fooled_once].min()
    often = PGD(eps=0.3, steps=5, restarts=20)(model, x, y, generator=generator())
    assert (model(often).argmax(1) != 0).all()


def test_more_restarts_never_fool_fewer() -> None:
    """Trap 3: a later restart that fails does not replace an earlier one that fooled."""
    model, (x, y) = OnFirstPixel(misleading), pixel_images(64)
    fooled = []
    for restarts in (1, 2, 3, 5):
        attack = PGD(eps=0.3, steps=5, restarts=restarts, keep_best=True)
        fooled.append(model(attack(model, x, y, generator=generator())).argmax(1) != 0)
    for fewer, more in pairwise(fooled):
        assert (fewer <= more).all()


def test_an_image_fooled_at_an_intermediate_iterate_stays_fooled() -> None:
    """Trap 3: a class that wins on a narrow strip only, passed on the way to a higher loss."""

    def strip(t: Tensor) -> list[Tensor]:
        bump = ((t - 0.15).abs() < 0.02).to(t.dtype)
        return [0 * t, -1 + 1.5 * bump, *[-2 + 6 * t] * 8]

    model, (x, y) = OnFirstPixel(strip), pixel_images(2)
    steps = {"eps": 0.3, "steps": 6, "step_size": 0.05, "random_start": False}
    last = PGD(**steps)(model, x, y)
    assert torch.allclose(last, x + 0.3)
    assert (model(last).argmax(1) == 0).all()
    best = PGD(**steps, keep_best=True)(model, x, y)
    assert torch.allclose(best, x + 0.15)
    assert (model(best).argmax(1) != 0).all()


@pytest.mark.parametrize("steps", [1, 4])
def test_the_last_step_is_scored(steps: int) -> None:
    """Trap 3: only the end of the last step crosses the boundary, at t = 0.29."""
    model, (x, y) = OnFirstPixel(lambda t: [0 * t, t - 0.29]), pixel_images(2)
    attack = PGD(
        eps=0.3,
        steps=steps,
        step_size=0.3 / steps,
        random_start=False,
        keep_best=True,
    )
    assert (model(attack(model, x, y)).argmax(1) != 0).all()


@pytest.mark.parametrize("keep_best", [True, False])
@pytest.mark.parametrize("norm", list(Norm))
def test_one_step_does_not_return_the_clean_image(norm: Norm, keep_best: bool) -> None:
    """Trap 3."""
    model, x = tanh_network(12, 3, gain=1.0), everywhere(6, 1, 3, 4)
    y = model(x).argmax(1)
    attack = PGD(norm=norm, eps=0.01, steps=1, random_start=False, keep_best=keep_best)
    x_adv = attack(model, x, y)
    losses = nn.functional.cross_entropy
    assert (losses(model(x_adv), y, reduction="none") > losses(model(x), y, reduction="none")).all()


def test_a_fooled_image_takes_no_part_in_later_restarts() -> None:
    sizes: list[int] = []
    model, (x, y) = OnFirstPixel(misleading), pixel_images(32)
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    PGD(eps=0.3, steps=3, restarts=4)(model, x, y, generator=generator())
    per_restart = sizes[::4]
    assert len(sizes) == 4 * len(per_restart)
    assert per_restart[0] == 32
    assert all(more > fewer for more, fewer in pairwise(per_restart))


def test_images_that_are_wrong_already_stay_wrong() -> None:
    model, x = tanh_network(12, 3), everywhere(30, 1, 3, 4)
    y = (model(x).argmax(1) + 1) % 3
    x_adv = PGD(eps=0.2, random_start=False, keep_best=True)(model, x, y)
    assert (model(x_adv).argmax(1) != y).all()


def test_of_the_points_that_fool_the_one_of_highest_loss_is_kept() -> None:
    """The margins in a ledger, and training on these points, need the worst one, not the first."""
    model, (x, y) = OnFirstPixel(lambda t: [0 * t, t - 0.1]), pixel_images(2)
    attack = PGD(eps=0.3, steps=3, step_size=0.15, random_start=False, keep_best=True)
    assert torch.allclose(attack(model, x, y), x + 0.3)


@pytest.mark.parametrize(("norm", "eps"), [(Norm.linf, 0.1), (Norm.l2, 0.8), (Norm.l1, 5.0)])
def test_a_gaussian_start_is_right_next_to_the_image(norm: Norm, eps: float) -> None:
    """All but no step leads away from the start."""
    model, x, y = tanh_network(100, 4), everywhere(4, 1, 10, 10), torch.arange(4)
    attack = PGD(norm=norm, eps=eps, steps=1, step_size=1e-12, start="gaussian")
    nearby = torch.empty_like(x).normal_(0, 0.001, generator=generator(3))
    expected = ball(Threat(norm, eps)).project(x + nearby, x)
    x_adv = attack(model, x, y, generator=generator(3))
    assert torch.allclose(x_adv, expected, rtol=0, atol=1e-9)
    assert 0.0003 < (x_adv - x).std() < 0.0015


def offsets(start: str, count: int) -> Tensor:
    """Where searches with radius 0.1 began, from grey images of 6 x 7 pixels; (N, 6, 7)."""
    x = torch.full((count, 1, 6, 7), 0.5, dtype=torch.float64)
    attack = PGD(eps=0.1, steps=1, step_size=1e-12, start=start)
    model = nn.Sequential(nn.Flatten(1), nn.Linear(42, 2)).double()
    x_adv = attack(model, x, torch.zeros(count, dtype=torch.int64), generator=generator(7))
    return (x_adv - x).squeeze(1)


def striped(delta: Tensor) -> Tensor:
    """Which rows are at the edge everywhere, with one sign a column; (N,)."""
    upright = (delta - delta[:, :1]).abs().amax((1, 2)) < 1e-9
    return upright & ((delta.abs() - 0.1).abs().amax((1, 2)) < 1e-9)


def test_stripes_stand_at_the_edge_with_a_sign_a_column() -> None:
    delta = offsets("stripes", 400)
    assert striped(delta).all()
    # Fair coins: 2,800 of them are this far from even once in 15,000 times.
    assert abs(delta[:, 0].sign().mean()) < 4 / math.sqrt(2800)


def test_a_mixed_start_is_of_stripes_or_uniform_with_even_odds() -> None:
    delta = offsets("mixed", 1000)
    chosen = striped(delta)
    assert abs(chosen.double().mean() - 0.5) < 4 * 0.5 / math.sqrt(1000)
    others = delta[~chosen].flatten().numpy()
    assert kstest(others, "uniform", args=(-0.1, 0.2)).pvalue > 1e-3


class Threshold(nn.Module):
    """Says 1 where the first column is nearly as bright as it can be; flat everywhere else."""

    def forward(self, x: Tensor) -> Tensor:
        excess = torch.relu(x[..., 0].mean((1, 2)) - 0.58)
        return torch.stack([torch.full_like(excess, 0.01), excess], 1)


@pytest.mark.parametrize(
    ("start", "share"), [("uniform", 0.0), ("gaussian", 0.0), ("stripes", 0.5), ("mixed", 0.25)]
)
def test_stripes_reach_what_gradients_elsewhere_do_not_show(start: str, share: float) -> None:
    """The first column is bright in half of the stripes, and in no random point."""
    x, y = torch.full((800, 1, 20, 3), 0.5), torch.zeros(800, dtype=torch.int64)
    attack, model = PGD(eps=0.1, steps=2, start=start), Threshold()
    broken = model(attack(model, x, y, generator=generator(1))).argmax(1) != y
    assert abs(broken.double().mean() - share) <= 4 * math.sqrt(share * (1 - share) / 800)


@pytest.mark.parametrize("start", ["gaussian", "stripes", "mixed"])
def test_every_kind_of_start_but_the_default_wants_a_random_one(start: str) -> None:
    with pytest.raises(InputError, match=rf"^start={start} is not allowed.*random_start=false"):
        PGD(random_start=False, start=start)


def test_restarts_without_a_random_start_are_refused() -> None:
    with pytest.raises(InputError, match=r"restarts=2.*random_start=false"):
        PGD(restarts=2, random_start=False)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"restarts": 0}, {"step_size": 0.0}, {"step_size": math.nan}]
)
def test_impossible_settings_are_refused_by_name(wrong: dict[str, float]) -> None:
    ((key, value),) = wrong.items()
    with pytest.raises(InputError, match=f"^{key}={value} "):
        PGD(**wrong)
