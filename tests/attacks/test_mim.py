"""Momentum iterative FGSM against a plain reference in NumPy, and against PGD."""

import numpy as np
import pytest
import torch

from robusttrain.attacks.mim import MIM
from robusttrain.attacks.pgd import PGD
from robusttrain.errors import InputError
from robusttrain.threat import Norm
from toys.attacks import (
    OnFirstPixel,
    everywhere,
    generator,
    loss_gradient,
    reference_projection,
    reference_step,
    tanh_network,
)

STEPS = 7


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
@pytest.mark.parametrize(("norm", "eps"), [(Norm.linf, 0.1), (Norm.l2, 0.8), (Norm.l1, 5.0)])
def test_iterates_are_those_of_the_plain_reference(norm: Norm, eps: float, decay: float) -> None:
    network, x = tanh_network(300, 4, gain=1.5), everywhere(4, 3, 10, 10)
    y = torch.tensor([0, 1, 2, 3])
    x_adv = MIM(norm=norm, eps=eps, steps=STEPS, decay=decay)(network, x, y)
    for i in range(len(x)):
        centre = z = x[i].flatten().numpy()
        momentum = np.zeros_like(z)
        for _ in range(STEPS):
            g = loss_gradient(network, z, int(y[i]))
            momentum = decay * momentum + g / np.abs(g).sum()
            z = z + eps / STEPS * reference_step(norm, momentum, z)
            z = reference_projection(norm, z, centre, eps)
        assert np.allclose(x_adv[i].flatten().numpy(), z, rtol=0, atol=1e-9)


@pytest.mark.parametrize("stop_early", [True, False])
@pytest.mark.parametrize("random_start", [True, False])
def test_without_momentum_it_is_pgd(random_start: bool, stop_early: bool) -> None:
    network, x = tanh_network(12, 3), everywhere(20, 1, 3, 4)
    y = network(x).argmax(1)
    keys = {"eps": 0.2, "step_size": 0.03, "random_start": random_start, "stop_early": stop_early}
    x_adv = MIM(**keys, decay=0.0)(network, x, y, generator=generator(2))
    assert torch.equal(x_adv, PGD(**keys)(network, x, y, generator=generator(2)))
    assert not torch.equal(x_adv, MIM(**keys)(network, x, y, generator=generator(2)))


def test_momentum_carries_the_search_over_a_dip() -> None:
    """The loss rises to t = 0.1, falls to t = 0.16 and rises again: PGD goes back and forth."""
    model = OnFirstPixel(lambda t: [0 * t, t - 2 * (t - 0.1).clamp(0, 0.06)])
    x, y = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    keys = {"eps": 0.3, "steps": 12, "step_size": 0.025, "random_start": False}
    assert PGD(**keys)(model, x, y).item() < 0.65
    assert MIM(**keys)(model, x, y).item() == pytest.approx(0.8)


def test_the_first_iterate_that_fools_is_kept_when_it_stops_early() -> None:
    model = OnFirstPixel(lambda t: [0 * t, t - 0.09])
    x, y = torch.full((2, 1, 1, 1), 0.5), torch.tensor([0, 0])
    keys = {"eps": 0.3, "steps": 6}
    assert torch.allclose(MIM(**keys, stop_early=True)(model, x, y), x + 0.1)
    assert torch.allclose(MIM(**keys)(model, x, y), x + 0.3)


@pytest.mark.parametrize(
    "wrong", [{"decay": -0.1}, {"decay": float("nan")}, {"steps": 0}, {"step_size": 0.0}]
)
def test_impossible_settings_are_refused_by_name(wrong: dict[str, float]) -> None:
    ((key, value),) = wrong.items()
    with pytest.raises(InputError, match=f"^{key}={value} "):
        MIM(**wrong)
