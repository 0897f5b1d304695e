"""AVG, E-AT and RAMP: training on several balls."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robusttrain.attacks.max_of_norms import MaxOfNorms
from robusttrain.attacks.msd import MSD
from robusttrain.attacks.none import NoAttack
from robusttrain.attacks.pgd import PGD
from robusttrain.defenses.avg import AVG
from robusttrain.defenses.eat import EAT, KEPT
from robusttrain.defenses.ramp import RAMP
from robusttrain.errors import InputError
from robusttrain.threat import Norm, Threat, of_radii
from toys.attacks import everywhere, generator, tanh_network

RADII = {"l2": 0.3, "linf": 0.1, "l1": 0.8}
SHAPE = (8, 1, 3, 4)


def loss(logits: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(logits, y, reduction="none")


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    x = everywhere(*SHAPE)
    return tanh_network(12, 4), x, torch.arange(len(x)) % 4


def gradient_of(objective: Tensor, model: nn.Module) -> Tensor:
    slopes = torch.autograd.grad(objective, list(model.parameters()))
    return torch.cat([slope.flatten() for slope in slopes])


def test_avg_descends_the_mean_of_the_worst_cases() -> None:
    """Against worst cases that are trained on one by one, in value and gradient."""
    model, x, y = problem()
    attack = PGD(steps=3, random_start=False)
    defense = AVG(attack, RADII)
    found = defense.inner(model, x, y, generator=generator())
    mine = defense.outer(model, x, found, y, loss=loss)
    single = torch.stack(
        [loss(model(attack.under(each)(model, x, y)), y).mean() for each in of_radii(RADII)]
    ).mean()
    assert torch.allclose(mine.loss, single, rtol=1e-12)
    assert torch.allclose(gradient_of(mine.loss, model), gradient_of(single, model), rtol=1e-9)


def test_avg_shows_the_logits_of_the_norm_that_is_worst_for_each_image() -> None:
    model, x, y = problem()
    defense = AVG(PGD(steps=3), RADII)
    found = defense.inner(model, x, y, generator=generator())
    shown = defense.outer(model, x, found, y, loss=loss).adversarial
    assert shown is not None
    each = torch.stack([loss(model(x_adv), y) for x_adv in found])
    assert torch.equal(loss(shown, y), each.amax(0))


def test_eat_trains_on_the_extremes_only() -> None:
    assert EAT(PGD(), RADII).extremes == (Threat(Norm.l1, 0.8), Threat(Norm.linf, 0.1))
    assert EAT(PGD(), {"linf": 0.1, "l2": 1}).extremes[0].norm is Norm.l2


class Told:
    """An attack that notes its threat model and returns the images."""

    def __init__(self, threat: Threat | None, seen: list[Norm]) -> None:
        self.threat, self.seen = threat, seen

    def under(self, threat: Threat) -> "Told":
        return Told(threat, self.seen)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Tensor:
        assert self.threat is not None
        self.seen.append(self.threat.norm)
        return x


def drawn(defense: EAT, seen: Sequence[Norm], batches: int) -> float:
    """The share of batches that were attacked in linf."""
    model, x, y = problem()
    draws = generator()
    for _ in range(batches):
        defense.inner(model, x, y, generator=draws)
    return sum(norm is Norm.linf for norm in seen) / batches


@pytest.mark.parametrize("errors", [(1.0, 1.0), (0.2, 0.6), (0.0, 0.3)])
def test_eat_draws_a_norm_in_proportion_to_its_error(errors: tuple[float, float]) -> None:
    seen: list[Norm] = []
    defense = EAT(Told(Threat(Norm.l1, 1), seen), RADII)
    defense.load_state_dict({"errors": torch.tensor(errors)})
    expected, batches = errors[1] / sum(errors), 400
    tolerance = 4 * (expected * (1 - expected) / batches) ** 0.5
    assert abs(drawn(defense, seen, batches) - expected) <= tolerance


def test_eat_keeps_a_running_error_of_the_norm_that_it_drew_once_a_batch() -> None:
    model, x, y = problem()
    defense = EAT(PGD(steps=2), RADII)
    x_adv = defense.inner(model, x, y, generator=generator())
    for _ in range(2):
        # As with adversarial weight perturbation.
        objective = defense.outer(model, x, x_adv, y, loss=loss)
    assert objective.adversarial is not None
    wrong = float((objective.adversarial.argmax(1) != y).float().mean())
    after = KEPT + (1 - KEPT) * wrong
    assert sorted(defense.state_dict()["errors"].tolist()) == pytest.approx(sorted([1, after]))


def test_eat_is_the_worst_case_in_the_drawn_norm() -> None:
    model, x, y = problem()
    attack = PGD(steps=3, random_start=False)
    defense = EAT(attack, RADII)
    x_adv = defense.inner(model, x, y, generator=generator())
    possible = [attack.under(each)(model, x, y) for each in defense.extremes]
    assert any(torch.equal(x_adv, one) for one in possible)
    mine = defense.outer(model, x, x_adv, y, loss=loss).loss
    assert torch.equal(mine, loss(model(x_adv), y).mean())


def test_ramp_is_max_on_the_extremes_if_its_weight_is_0() -> None:
    model, x, y = problem()
    defense = RAMP(PGD(steps=3, random_start=False), RADII, weight=0)
    found = defense.inner(model, x, y, generator=generator())
    mine = defense.outer(model, x, found, y, loss=loss)
    of_max = MaxOfNorms(defense.attack, {threat.norm: threat.eps for threat in defense.extremes})
    worst = loss(model(of_max(model, x, y, loss=loss, generator=generator())), y)
    assert mine.adversarial is not None
    assert torch.equal(loss(mine.adversarial, y), worst)
    assert torch.allclose(mine.loss, worst.mean(), rtol=1e-12)
    slopes = [gradient_of(each, model) for each in (mine.loss, worst.mean())]
    assert torch.allclose(*slopes, rtol=1e-9)


def test_ramp_adds_the_divergence_where_the_outermost_ball_has_not_broken_the_image() -> None:
    """Image by image, from the definition of the divergence."""
    model, x, y = problem()
    y[:5] = model(x[:5]).argmax(1)
    attack = PGD(steps=3, random_start=False)
    objectives = []
    for weight in (0.0, 2.0):
        defense = RAMP(attack, {"linf": 0.01, "l1": 0.08}, weight)
        found = defense.inner(model, x, y, generator=generator())
        objectives.append(defense.outer(model, x, found, y, loss=loss).loss)
    target, source = (model(each).softmax(1) for each in found)
    right = source.argmax(1) == y
    assert 0 < int(right.sum()) < len(x)
    each = [(p * (p / q).log()).sum() for p, q in zip(source[right], target[right], strict=True)]
    expected = 2 * torch.stack(each).mean()
    assert torch.allclose(objectives[1] - objectives[0], expected, rtol=1e-9)
    slopes = [gradient_of(each, model) for each in (objectives[1] - objectives[0], expected)]
    assert torch.allclose(*slopes, rtol=1e-6, atol=1e-10)


def test_ramp_without_an_image_that_is_right_has_no_divergence() -> None:
    model, x, _ = problem()
    y = (model(x).argmax(1) + 1) % 4
    defense = RAMP(PGD(steps=3, random_start=False), RADII)
    found = [x, x]
    assert torch.equal(defense.outer(model, x, found, y, loss=loss).loss, loss(model(x), y).mean())


@pytest.mark.parametrize("kind", [AVG, EAT, RAMP])
@pytest.mark.parametrize(
    ("attack", "radii", "key"),
    [
        (PGD(), {"l2": 1.0}, "threats"),
        (PGD(), {}, "threats"),
        (NoAttack(), RADII, "attack"),
        (MSD(RADII), RADII, "attack"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(
    kind: type[AVG | EAT | RAMP], attack: Any, radii: dict[str, float], key: str
) -> None:
    with pytest.raises(InputError) as caught:
        kind(attack, radii)
    assert caught.value.key == key
