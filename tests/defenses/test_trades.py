"""TRADES against the paper's formula in float64, and what its attack climbs."""

from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.model_view import Mode
from robusttrain.attacks.pgd import PGD, Start
from robusttrain.defenses.trades import TRADES
from robusttrain.errors import InputError
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball
from toys.defenses import (
    CLASSES,
    Fixed,
    asked,
    batch,
    generator,
    gradients_are_right,
    logits,
    objective_of,
    softmax,
)

NEARBY, _ = batch(seed=5)


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_the_loss_is_the_formula(beta: float) -> None:
    x, y = batch()
    p, q = softmax(logits(x)), softmax(logits(NEARBY))
    own = p[np.arange(len(p)), y.numpy()]
    expected = -np.log(own).mean() + beta * (p * np.log(p / q)).sum(1).mean()
    objective = objective_of(TRADES(Fixed(NEARBY), beta))
    assert objective.loss.item() == pytest.approx(expected, rel=1e-12)
    assert objective.clean is not None
    assert objective.adversarial is not None
    np.testing.assert_allclose(objective.clean.detach(), logits(x), rtol=1e-12)
    np.testing.assert_allclose(objective.adversarial.detach(), logits(NEARBY), rtol=1e-12)


def test_the_gradient_goes_through_both_sides() -> None:
    assert gradients_are_right(TRADES(Fixed(NEARBY), 2.0))


def linear() -> tuple[nn.Sequential, Tensor, Tensor]:
    layer = nn.Linear(6, CLASSES).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(CLASSES, 6, generator=generator(4)))
    return nn.Sequential(nn.Flatten(1), layer), *batch()


@pytest.mark.parametrize("norm", list(Norm))
def test_the_attack_climbs_the_divergence_from_the_clean_output(norm: Norm) -> None:
    """On softmax regression its gradient is (q - p) W, step by step."""
    model, x, y = linear()
    weight, bias = (p.detach().numpy() for p in model.parameters())
    attack = PGD(norm, 0.2, steps=4, step_size=0.1, start=Start.gaussian)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    asked(TRADES(attack), model, x, y)
    p = softmax(x.flatten(1).numpy() @ weight.T + bias)
    threat = ball(Threat(norm, 0.2))
    nearby = torch.empty_like(x).normal_(0, 0.001, generator=generator())
    z = threat.project(x + nearby, x)
    for _ in range(4):
        q = softmax(z.flatten(1).numpy() @ weight.T + bias)
        slope = torch.from_numpy((q - p) @ weight).view_as(x)
        z = threat.project(z + 0.1 * threat.ascent(slope, z), x)
    torch.testing.assert_close(seen[-1], z, rtol=0, atol=1e-9)


def normalised() -> nn.Sequential:
    """A network whose outputs depend on the mode, and whose running statistics stay."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        norm = nn.BatchNorm1d(6, momentum=0.0)
        nn.init.normal_(cast(Tensor, norm.running_mean))
        layers = nn.Flatten(1), norm, nn.Linear(6, CLASSES), nn.Dropout(0.5)
        return nn.Sequential(*layers).double()


@pytest.mark.parametrize("mode", list(Mode))
def test_the_attack_moves_away_from_the_output_in_its_own_mode(mode: Mode) -> None:
    """Otherwise the divergence at x is not 0, since it includes the difference of the modes."""
    model, (x, y) = normalised(), batch()
    in_eval = normalised().eval()(x)
    modes: list[bool] = []
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    attack = Fixed(NEARBY, mode)
    objective = asked(TRADES(attack), model, x, y)
    assert objective.clean is not None
    expected = in_eval if mode is Mode.eval else objective.clean
    torch.testing.assert_close(attack.loss.target, expected.log_softmax(1))
    assert not torch.allclose(objective.clean, in_eval)
    # In train mode each branch of the objective is computed once, and moves the statistics once.
    assert modes == [True, *([False] if mode is Mode.eval else []), True]
    assert model[1].num_batches_tracked == 2
    assert all(module.training for module in model.modules())


def test_attacks_that_cannot_climb_the_divergence_are_refused() -> None:
    with pytest.raises(InputError, match=r"^attack\.random_start=False is not allowed"):
        TRADES(FGSM())
    with pytest.raises(InputError, match=r"^attack\.label=predicted is not allowed"):
        TRADES(PGD(label="predicted"))
    with pytest.raises(InputError, match=r"^beta=-1 is not allowed"):
        TRADES(PGD(), -1)
