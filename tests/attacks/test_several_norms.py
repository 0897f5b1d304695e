"""MAX and MSD: the worst of several balls, on linear and on curved models."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robusttrain.attacks import several_threats, threats
from robusttrain.attacks.ddn import DDN
from robusttrain.attacks.max_of_norms import MaxOfNorms
from robusttrain.attacks.msd import MSD
from robusttrain.attacks.none import NoAttack
from robusttrain.attacks.pgd import PGD, projected_step
from robusttrain.errors import InputError
from robusttrain.threat import Norm, Threat, of_radii
from robusttrain.threat.balls import TOLERANCE, ball
from robusttrain.training.curriculum import Curriculum
from toys.attacks import Affine, everywhere, generator, interior, tanh_network

RADII = {"linf": 0.02, "l2": 0.06, "l1": 0.15}
SHAPE = (8, 1, 3, 4)

ATTACKS = {
    "max": lambda **keys: MaxOfNorms(PGD(steps=40, keep_best=True), keys.get("threats", RADII)),
    "msd": lambda **keys: MSD(keys.get("threats", RADII), steps=40),
}
every_attack = pytest.mark.parametrize("make", ATTACKS.values(), ids=ATTACKS.keys())


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x), y, reduction="none")


@every_attack
def test_on_a_linear_model_the_worst_ball_is_searched_to_its_end(make: Any) -> None:
    """The largest loss over the union is that of the norm with the largest eps |w|_dual."""
    model, x = Affine(2, 12), interior(*SHAPE)
    y = torch.arange(len(x)) % 2
    slope = (model.weight[1 - y] - model.weight[y]).view_as(x)
    gains = [each.eps * ball(each).dual_norm(slope) for each in of_radii(RADII)]
    x_adv = make()(model, x, y, generator=generator())
    rows = torch.arange(len(x))
    lead = model(x_adv)[rows, 1 - y] - model(x_adv)[rows, y]
    before = model(x)[rows, 1 - y] - model(x)[rows, y]
    assert torch.allclose(lead - before, torch.stack(gains).amax(0), rtol=1e-4, atol=0)


@every_attack
def test_the_result_lies_in_the_union_of_the_balls_and_in_the_box(make: Any) -> None:
    model, x = tanh_network(12, 4), everywhere(*SHAPE)
    x_adv = make()(model, x, torch.arange(len(x)) % 4, generator=generator())
    inside = [ball(each).norm(x_adv - x) <= each.eps * (1 + TOLERANCE) for each in of_radii(RADII)]
    assert torch.stack(inside).any(0).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()


def test_the_maximum_is_that_of_the_single_searches() -> None:
    model, x = tanh_network(12, 4), everywhere(*SHAPE)
    y = torch.arange(len(x)) % 4
    attack = PGD(steps=5, random_start=False)
    x_adv = MaxOfNorms(attack, RADII)(model, x, y, generator=generator())
    single = [
        losses(model, attack.under(each)(model, x, y, generator=generator()), y)
        for each in of_radii(RADII)
    ]
    assert torch.equal(losses(model, x_adv, y), torch.stack(single).amax(0))


@pytest.mark.parametrize("seed", range(3))
def test_no_single_step_is_better_than_that_of_msd(seed: int) -> None:
    """From the same point, the step of each norm reaches at most the loss that MSD reaches."""
    steps = 6
    model, x = tanh_network(12, 4, seed), everywhere(*SHAPE, seed=seed)
    y = torch.arange(len(x)) % 4
    points = [_after(model, x, y, steps=taken) for taken in range(steps + 1)]
    for before, after in pairwise(points):
        point = before.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(losses(model, point, y).sum(), point)
        for each in of_radii(RADII):
            own = ball(each)
            length = projected_step(own, steps, None).length
            single = own.project(before + length * own.ascent(gradient, before), x)
            assert (losses(model, after, y) >= losses(model, single, y) - 1e-12).all()


def _after(model: nn.Module, x: Tensor, y: Tensor, *, steps: int) -> Tensor:
    """Where MSD is after some of its six steps."""
    if steps == 0:
        return x
    lengths = {norm: 2.5 * eps / 6 for norm, eps in RADII.items()}
    return MSD(RADII, steps=steps, step_sizes=lengths)(model, x, y, generator=generator())


def test_msd_costs_a_gradient_and_a_pass_for_each_norm() -> None:
    model, passes = tanh_network(12, 4), []
    model.register_forward_hook(lambda *_: passes.append(1))
    x = everywhere(*SHAPE)
    MSD(RADII, steps=5)(model, x, torch.zeros(len(x), dtype=torch.long), generator=generator())
    assert len(passes) == 5 * (1 + len(RADII))


def test_a_loss_that_is_not_a_number_is_the_worst() -> None:
    class Undefined(nn.Module):
        """Where the sum of the pixels has grown by 0.14, which only the l2 step does not reach."""

        def forward(self, x: Tensor) -> Tensor:
            total = x.flatten(1).sum(1)
            return torch.stack([-total, torch.where(total > 6.14, torch.nan, total)], 1)

    x = torch.full(SHAPE, 0.5, dtype=torch.float64)
    y = torch.zeros(len(x), dtype=torch.long)
    x_adv = MaxOfNorms(PGD(steps=20), {"l2": 0.03, "linf": 0.02})(
        Undefined(), x, y, generator=generator()
    )
    assert (x_adv.flatten(1).sum(1) > 6.14).all()


@every_attack
def test_the_curriculum_scales_all_radii(make: Any) -> None:
    early = Curriculum(eps_warmup=0.5).at(make(), 1, 4)
    assert {t.norm: t.eps for t in several_threats(early)} == {
        norm: pytest.approx(eps / 2) for norm, eps in RADII.items()
    }


def test_the_balls_of_the_attack_inside_do_not_count() -> None:
    attack = MaxOfNorms(PGD(eps=0.9), {"linf": 0.1, "l2": 1})
    assert threats(attack) == [Threat(Norm.linf, 0.1), Threat(Norm.l2, 1)]


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: MSD({"linf": 0.1}), "threats"),
        (lambda: MSD({}), "threats"),
        (lambda: MSD({"linf": 0.1, "l0": 3}), "threats.l0"),
        (lambda: MSD({"linf": 2.0, "l2": 3}), "threats.linf"),
        (lambda: MSD({"linf": 0.1, "l2": -1}), "threats.l2"),
        (lambda: MSD(RADII, steps=0), "steps"),
        (lambda: MSD(RADII, mode="test"), "mode"),  # type: ignore[arg-type]
        (lambda: MSD({"linf": 0.1, "l2": 1}, step_sizes={"l1": 1}), "step_sizes.l1"),
        (lambda: MaxOfNorms(NoAttack(), RADII), "attack"),
        (lambda: MaxOfNorms(MSD(RADII), RADII), "attack"),
        (lambda: MaxOfNorms(DDN(norm=Norm.l2), RADII), "attack.norm"),
        (lambda: MaxOfNorms(PGD(), {"l2": 1}), "threats"),
    ],
)
def test_what_cannot_be_searched_is_refused(make: Any, key: str) -> None:
    with pytest.raises(InputError) as caught:
        make()
    assert caught.value.key == key
