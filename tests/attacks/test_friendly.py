"""Friendly PGD on a model whose boundary is known, and where it is PGD."""

from typing import Any

import pytest
import torch
from torch import Tensor

from robusttrain.attacks.attack_loss import AttackLoss, cross_entropy
from robusttrain.attacks.friendly import FriendlyPGD
from robusttrain.attacks.pgd import PGD
from robusttrain.defenses.divergence import DivergenceFrom, divergence, log_probabilities
from robusttrain.errors import InputError
from robusttrain.threat import Norm
from toys.attacks import OnFirstPixel, everywhere, generator, tanh_network

STRAIGHT: dict[str, Any] = {"eps": 0.3, "steps": 6, "step_size": 0.05, "random_start": False}

# Grey images: the first is right until its pixel has risen by 0.12, the second is wrong already.
X, Y = torch.full((2, 1, 1, 1), 0.5, dtype=torch.float64), torch.tensor([0, 1])


def rising(t: Tensor) -> list[Tensor]:
    return [0 * t, t - 0.12]


@pytest.mark.parametrize(
    ("tau", "rises", "falls"),
    # Iterates are 0.05 apart: the third step is the first that crosses.
    [(0, 0.15, 0.0), (1, 0.20, 0.05), (2, 0.25, 0.10), (3, 0.30, 0.15), (6, 0.30, 0.30)],
)
def test_a_search_ends_tau_steps_behind_the_boundary(tau: int, rises: float, falls: float) -> None:
    x_adv = FriendlyPGD(**STRAIGHT, tau=tau)(OnFirstPixel(rising), X, Y)
    expected = X + torch.tensor([rises, -falls], dtype=torch.float64).view(2, 1, 1, 1)
    assert torch.allclose(x_adv, expected, rtol=0, atol=1e-9)


def test_an_image_that_is_done_takes_no_part_in_later_passes() -> None:
    model, sizes = OnFirstPixel(rising), []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    FriendlyPGD(**STRAIGHT)(model, X, Y)
    # The wrong one ends where it started, the other one behind its third step.
    assert sizes == [2, 1, 1, 1]


@pytest.mark.parametrize(("norm", "eps"), [(Norm.linf, 0.1), (Norm.l2, 0.8), (Norm.l1, 5.0)])
def test_with_steps_to_spare_it_is_pgd(norm: Norm, eps: float) -> None:
    model, x, y = tanh_network(100, 4), everywhere(6, 1, 10, 10), torch.arange(6) % 4
    friendly = FriendlyPGD(norm=norm, eps=eps, steps=5, tau=5)
    pgd = PGD(norm=norm, eps=eps, steps=5)
    found = [attack(model, x, y, generator=generator(1)) for attack in (friendly, pgd)]
    assert torch.equal(*found)
    closer = FriendlyPGD(norm=norm, eps=eps, steps=5)(model, x, y, generator=generator(1))
    losses = [cross_entropy(model(z), y) for z in (closer, found[1])]
    assert (model(found[1]).argmax(1) != y).any()
    assert (losses[0] < losses[1]).any()


@pytest.mark.parametrize("key", ["restarts", "keep_best", "stop_early", "targets"])
def test_what_is_for_evaluations_is_no_setting_of_it(key: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{key}'"):
        FriendlyPGD(**{key: 1})


@pytest.mark.parametrize(
    ("key", "value"), [("tau", -1), ("steps", 0), ("step_size", 0.0), ("objective", "loose")]
)
def test_impossible_settings_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^{key}={value} is not allowed"):
        FriendlyPGD(**{key: value})


def test_every_kind_of_start_but_the_default_wants_a_random_one() -> None:
    with pytest.raises(InputError, match=r"^start=stripes is not allowed.*random_start=false"):
        FriendlyPGD(random_start=False, start="stripes")


# The divergence that defenses have it climb.


def test_the_divergence_is_that_of_the_formula() -> None:
    first, second = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator(0))
    p, q = first.softmax(1), second.softmax(1)
    expected = (p * (p / q).log()).sum(1)
    found = divergence(log_probabilities(first), second)
    assert torch.allclose(found, expected, rtol=1e-12)


def test_a_loss_that_keeps_something_for_each_image_is_cut_with_them() -> None:
    model, x, y = tanh_network(12, 3), everywhere(5, 1, 3, 4), torch.zeros(5, dtype=torch.int64)
    away = DivergenceFrom(torch.randn(5, 3, dtype=torch.float64, generator=generator(0)))
    surrogate, rows = AttackLoss(model, y, away, targeted=False), torch.tensor([3, 0])
    value, _ = surrogate.score(x)
    part, _ = surrogate.take(rows).score(x[rows])
    assert torch.allclose(part, value[rows], rtol=1e-9)
    # PGD cuts its images where it restarts.
    attack = PGD(steps=2, restarts=3, keep_best=True)
    assert attack(model, x, y, loss=away, generator=generator(0)).shape == x.shape
