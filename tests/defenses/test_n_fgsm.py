"""N-FGSM on a linear model, where its perturbation has a closed form."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robusttrain.defenses.n_fgsm import NFGSM
from robusttrain.errors import InputError
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball
from toys.defenses import asked


def problem(low: float = 0.3, high: float = 0.7) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(1), nn.Linear(12, 2)).double()
    x = low + (high - low) * torch.rand(16, 1, 3, 4, dtype=torch.float64)
    return model, x, torch.arange(16) % 2


def trained_on(defense: NFGSM, model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """The images of the pass whose loss is minimised."""
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    asked(defense, model, x, y, draws=torch.Generator().manual_seed(5))
    return seen[-1]


def noise(norm: Norm, radius: float, x: Tensor) -> Tensor:
    return ball(Threat(norm, radius)).random_offset(x, torch.Generator().manual_seed(5))


STEP: dict[Norm, Callable[[Tensor], Tensor]] = {
    Norm.linf: torch.sign,
    Norm.l2: lambda w: w / w.norm(dim=1, keepdim=True),
    Norm.l1: lambda w: w.sign() * (w.abs() == w.abs().amax(1, keepdim=True)),
}


@pytest.mark.parametrize("norm", list(Norm))
def test_the_perturbation_is_noise_and_a_whole_step(norm: Norm) -> None:
    model, x, y = problem()
    weight = dict(model.named_parameters())["1.weight"].detach()
    towards = weight[1 - y] - weight[y]
    expected = x + noise(norm, 0.15, x) + 0.05 * STEP[norm](towards).view_as(x)
    x_adv = trained_on(NFGSM(norm, 0.05, k=3.0), model, x, y)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-12)
    assert (ball(Threat(norm, 0.05)).norm(x_adv - x) > 0.05).any()


def test_noise_and_step_are_each_clipped_to_the_box() -> None:
    model, x, y = problem(0.0, 1.0)
    weight = dict(model.named_parameters())["1.weight"].detach()
    towards = (weight[1 - y] - weight[y]).view_as(x)
    noisy = (x + noise(Norm.linf, 0.6, x)).clamp(0, 1)
    expected = (noisy + 0.3 * towards.sign()).clamp(0, 1)
    x_adv = trained_on(NFGSM(eps=0.3), model, x, y)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-12)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"^k=-1 is not allowed"):
        NFGSM(k=-1)
    with pytest.raises(InputError, match=r"^eps=-1 is not allowed"):
        NFGSM(eps=-1)
