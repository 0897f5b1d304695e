"""IBP and MTL-IBP: the loss by hand, its limits, its cost, and that its bounds hold."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks.apgd import APGD
from robusttrain.attacks.none import NoAttack
from robusttrain.attacks.pgd import PGD
from robusttrain.bounds.intervals import Interval
from robusttrain.defenses.bounded import Statistics
from robusttrain.defenses.ibp import IBP, MTLIBP
from robusttrain.defenses.standard import Standard
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.errors import InputError
from robusttrain.noise.gaussian import Gaussian
from robusttrain.threat import Norm
from toys.defenses import (
    SHAPE,
    Fixed,
    asked,
    batch,
    cross_entropies,
    generator,
    gradients_are_right,
    logits,
    network,
    objective_of,
    worst_logits,
)


def test_the_loss_is_that_of_the_paper() -> None:
    expected = 0.7 * cross_entropies(logits(batch()[0])) + 0.3 * cross_entropies(worst_logits(0.2))
    objective = objective_of(IBP(NoAttack(), eps=0.2, weight=0.3))
    assert objective.loss.item() == pytest.approx(expected.mean(), rel=1e-9)


def test_with_an_attack_it_is_the_mixture_of_what_is_found_and_what_is_proven() -> None:
    x_adv = torch.rand(batch()[0].shape, generator=generator(), dtype=torch.float64)
    expected = 0.7 * cross_entropies(logits(x_adv)) + 0.3 * cross_entropies(worst_logits(0.2))
    objective = objective_of(MTLIBP(Fixed(x_adv), eps=0.2, weight=0.3))
    assert objective.loss.item() == pytest.approx(expected.mean(), rel=1e-9)


def test_its_gradient_is_that_of_the_loss() -> None:
    assert gradients_are_right(IBP(NoAttack(), eps=0.1))
    assert gradients_are_right(MTLIBP(Fixed(batch()[0] / 2), eps=0.1, weight=0.9))


def test_at_radius_zero_it_is_standard_training() -> None:
    found = objective_of(MTLIBP(PGD(eps=0.0, steps=2), eps=0.0, weight=0.9)).loss
    torch.testing.assert_close(found, objective_of(Standard()).loss)


def test_what_it_proves_is_above_what_attacks_find() -> None:
    attack = APGD(eps=0.2, steps=30)
    found = objective_of(WorstCase(attack)).loss
    proven = objective_of(IBP(NoAttack(), eps=0.2, weight=1.0)).loss
    assert found > objective_of(Standard()).loss + 0.01
    assert proven > found


def test_logits_are_those_of_the_images() -> None:
    objective = objective_of(IBP(NoAttack(), eps=0.2))
    assert objective.clean is not None
    assert objective.adversarial is None
    np.testing.assert_allclose(objective.clean.detach(), logits(batch()[0]))
    x_adv = batch()[0] / 2
    objective = objective_of(MTLIBP(Fixed(x_adv), eps=0.2))
    assert objective.clean is None
    assert objective.adversarial is not None
    np.testing.assert_allclose(objective.adversarial.detach(), logits(x_adv))


class _Counted(nn.Module):
    """The toy network, which counts its passes of images and of intervals."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        self.seen: Counter[str] = Counter()

    def forward(self, x: Any) -> Any:
        self.seen["intervals" if isinstance(x, Interval) else "images"] += 1
        return self.network(x)


@pytest.mark.parametrize(("defense", "images"), [(IBP(NoAttack()), 1), (MTLIBP(PGD(steps=5)), 6)])
def test_a_batch_costs_one_pass_of_intervals_and_no_superfluous_pass_of_images(
    defense: IBP, images: int
) -> None:
    model = _Counted()
    objective_of(defense, model)
    assert model.seen == {"images": images, "intervals": 1}


def test_bounds_of_running_statistics_are_those_of_the_network_in_eval_mode() -> None:
    """With running statistics, which only images update, and without dropout; no mode changes."""
    layers = nn.Flatten(1), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 4)
    model = nn.Sequential(*layers).double().train()
    x, y = batch()
    with torch.no_grad():
        model[1].running_mean.uniform_(-1, 1)
        model[1].running_var.uniform_(0.5, 2)
        model[1].momentum = 0.0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        objective = objective_of(
            IBP(NoAttack(), eps=0.1, weight=1.0, statistics=Statistics.running), model
        )
    assert model[1].num_batches_tracked == 1
    assert all(module.training for module in model.modules())
    # BatchNorm scales pixels one by one, so that the bounds are the worst case of an affine model.
    model.eval()
    matrix = torch.autograd.functional.jacobian(lambda v: model(v).sum(0), x[:1]).flatten(1)
    low, high = ((x + shift).clamp(0, 1).flatten(1) for shift in (-0.1, 0.1))
    apart = matrix - matrix[y][:, None]
    reach = (apart.abs() @ ((high - low) / 2)[:, :, None]).squeeze(2)
    centre = model(((high + low) / 2).view_as(x))
    worst = centre - centre.gather(1, y[:, None]) + reach
    expected = cross_entropies(worst.detach().numpy()).mean()
    assert objective.loss.item() == pytest.approx(expected, rel=1e-6)


def test_it_proves_more_with_training() -> None:
    x, y = batch()
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)

    def proven() -> Tensor:
        return model(Interval.around(x, 0.02)).margins(y).argmax(1) == y

    before = int(proven().sum())
    for _ in range(400):
        objective = asked(IBP(NoAttack(), eps=0.02), model, x, y)
        optimizer.zero_grad()
        objective.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    rows = proven()
    assert int(rows.sum()) > before
    x_adv = APGD(eps=0.02, steps=50)(model, x, y, generator=generator())
    assert bool((model(x_adv).argmax(1) == y)[rows].all())


@pytest.mark.parametrize("norm", [Norm.l2, Norm.l1])
def test_other_norms_are_refused(norm: Norm) -> None:
    with pytest.raises(InputError, match=rf"^norm={norm} is not allowed: it must be linf"):
        IBP(NoAttack(), norm=norm).refuse_unfit(network().float(), SHAPE)


def test_models_without_known_bounds_are_refused_and_left_as_they_were() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), network().float()).train()
    IBP(NoAttack()).refuse_unfit(model, SHAPE)
    assert model.training
    assert model[0].num_batches_tracked == 0
    with pytest.raises(
        InputError, match=r"^defense=ibp or another one on bounds .*not through softmax"
    ):
        IBP(NoAttack()).refuse_unfit(nn.Sequential(model, nn.Softmax(1)), SHAPE)
    Gaussian(0.1, predict=True).install(model, 0)
    with pytest.raises(InputError, match=r"^noise.predict=True .* false with defense=ibp"):
        IBP(NoAttack()).refuse_unfit(model, SHAPE)


@pytest.mark.parametrize("weight", [1.1, -0.1, float("nan")])
def test_the_weight_is_a_share(weight: float) -> None:
    with pytest.raises(InputError, match=r"^weight=.* is not allowed: it must be from 0 to 1"):
        IBP(NoAttack(), weight=weight)


def test_a_radius_is_not_negative() -> None:
    with pytest.raises(InputError, match=r"^eps=-0.1 is not allowed"):
        IBP(NoAttack(), eps=-0.1)
