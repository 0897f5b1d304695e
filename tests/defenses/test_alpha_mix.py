"""AlphaMix: its limits, its mixture, and what its gradient must not reach."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks import Attack, cross_entropy
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.lbfgs import LBFGS
from robusttrain.attacks.pgd import PGD
from robusttrain.attacks.uniform import Uniform
from robusttrain.defenses import Defense
from robusttrain.defenses.alpha_mix import AlphaMix
from robusttrain.defenses.standard import Standard
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.errors import InputError
from toys.defenses import asked

ATTACKS: dict[str, Callable[[], Attack]] = {
    "fgsm": lambda: FGSM(eps=0.2),
    "fgsm_rs": lambda: FGSM(eps=0.2, random_start=True),
    "pgd": lambda: PGD(eps=0.2, steps=3),
    "lbfgs": lambda: LBFGS(eps=0.2, steps=4, rounds=2),
    "uniform": lambda: Uniform(eps=0.2),
}
every_attack = pytest.mark.parametrize("attack", [make() for make in ATTACKS.values()], ids=ATTACKS)


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(1), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
    return model, torch.rand(6, 1, 3, 3), torch.arange(6) % 3


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def loss_and_gradient(defense: Defense) -> tuple[float, Tensor]:
    model, x, y = problem()
    objective = asked(defense, model, x, y, draws=generator())
    return objective.loss.item(), gradient(model, objective.loss)


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def mean_cross_entropy(logits: Tensor, y: Tensor) -> float:
    values = logits.detach().double().numpy()
    own = values[np.arange(len(values)), y.numpy()]
    return float((np.log(np.exp(values).sum(1)) - own).mean())


@every_attack
@pytest.mark.parametrize(
    ("alpha", "end"), [(1 - 1e-9, lambda _: Standard()), (1e-9, WorstCase)], ids=["clean", "worst"]
)
def test_the_ends_are_the_known_defenses(
    attack: Attack, alpha: float, end: Callable[[Attack], Defense]
) -> None:
    loss, slope = loss_and_gradient(AlphaMix(attack, alpha))
    expected, expected_slope = loss_and_gradient(end(attack))
    assert loss == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(slope, expected_slope, rtol=1e-5, atol=1e-7)


@every_attack
def test_the_loss_is_the_mixture(attack: Attack) -> None:
    model, x, y = problem()
    x_adv = attack(model, x, y, generator=generator())
    clean, adversarial = (mean_cross_entropy(model(point), y) for point in (x, x_adv))
    assert abs(clean - adversarial) > 1e-3
    loss, _ = loss_and_gradient(AlphaMix(attack, 0.3))
    assert loss == pytest.approx(0.3 * clean + 0.7 * adversarial, abs=1e-6)


@every_attack
def test_the_adversarial_images_are_constants_of_the_gradient(attack: Attack) -> None:
    model, x, y = problem()
    fixed = torch.from_numpy(attack(model, x, y, generator=generator()).numpy().copy())
    mixture = 0.3 * cross_entropy(model(x), y) + 0.7 * cross_entropy(model(fixed), y)
    _, slope = loss_and_gradient(AlphaMix(attack, 0.3))
    torch.testing.assert_close(slope, gradient(model, mixture.mean()), rtol=1e-5, atol=1e-7)


@every_attack
def test_the_logits_are_those_of_the_two_points(attack: Attack) -> None:
    model, x, y = problem()
    defense = AlphaMix(attack, 0.5)
    objective = asked(defense, model, x, y, draws=generator())
    x_adv = attack(model, x, y, generator=generator())
    torch.testing.assert_close(objective.clean, model(x))
    torch.testing.assert_close(objective.adversarial, model(x_adv))


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_alpha_is_a_share(alpha: float) -> None:
    with pytest.raises(InputError, match=r"^alpha=.* is not allowed: it must be between 0 and 1"):
        AlphaMix(FGSM(), alpha)
