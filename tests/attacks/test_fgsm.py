from collections.abc import Callable

import pytest
import torch

from robusttrain.attacks.fgsm import FGSM
from robusttrain.errors import InputError
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball
from toys.attacks import Affine, everywhere, generator, interior


class Computed(torch.nn.Module):
    """A model whose logits are a given function of the images."""

    def __init__(self, logits: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits(x)


@pytest.mark.parametrize("step_size", [None, 0.02])
def test_random_start_steps_by_a_quarter_more_than_the_radius_and_is_cut_back(
    step_size: float | None,
) -> None:
    """Wong, Rice and Kolter 2020, Algorithm 3: uniform start, a sign step of 1.25 eps, clipping."""
    eps, model, x = 0.1, Affine(2, 300), everywhere(4, 3, 10, 10)
    y = torch.tensor([0, 1, 0, 1])
    attack = FGSM(eps=eps, random_start=True, step_size=step_size)
    x_adv = attack(model, x, y, generator=generator(7))
    start = x + ball(Threat(Norm.linf, eps)).random_offset(x, generator(7))
    sign = (model.weight[1 - y] - model.weight[y]).sign().view_as(x)
    free = start + (0.125 if step_size is None else step_size) * sign
    expected = torch.minimum(torch.maximum(free, x - eps), x + eps).clamp(0, 1)
    assert torch.allclose(x_adv, expected)
    # Steps that end inside the ball tell 1.25 eps from all longer ones.
    assert ((x_adv - x).abs() < eps - 1e-6).float().mean() > 0.05


def test_the_random_start_may_leave_the_box() -> None:
    """On a black image with slopes upwards, a share of 5/8 of the starts reaches x + eps.

    A start u uniform in [-eps, eps] gets there where u + 1.25 eps >= eps. Cut with the box first,
    all would: that is plain FGSM again, and training with it breaks down on MNIST.
    """

    def brightness(images: torch.Tensor) -> torch.Tensor:
        total = images.flatten(1).sum(1)
        return torch.stack([-total, total], 1)

    model = Computed(brightness)
    x, y = torch.zeros(1, 1, 64, 64), torch.tensor([0])
    x_adv = FGSM(eps=0.3, random_start=True)(model, x, y, generator=generator())
    assert abs((x_adv > 0.3 - 1e-6).float().mean() - 5 / 8) < 0.03


def test_the_gradient_is_taken_at_the_random_start() -> None:
    def bowl(images: torch.Tensor) -> torch.Tensor:
        """The loss of class 0 grows with the distance of each pixel from 1/2."""
        size = (images - 0.5).square().flatten(1).sum(1)
        return torch.stack([-size, size], 1)

    x, y = torch.full((2, 1, 4, 4), 0.5), torch.zeros(2, dtype=torch.int64)
    assert torch.equal(FGSM(eps=0.1)(Computed(bowl), x, y), x)
    x_adv = FGSM(eps=0.1, random_start=True)(Computed(bowl), x, y, generator=generator())
    start = ball(Threat(Norm.linf, 0.1)).random_start(x, generator())
    assert torch.allclose(x_adv, x + 0.1 * (start - x).sign())


@pytest.mark.parametrize("step_size", [0.1, 0.0])
def test_a_step_size_needs_a_random_start(step_size: float) -> None:
    with pytest.raises(InputError, match=r"step_size=.*random_start"):
        FGSM(step_size=step_size)


def test_a_step_of_no_length_is_refused() -> None:
    with pytest.raises(InputError, match=r"^step_size=0\.0 "):
        FGSM(random_start=True, step_size=0.0)


def test_one_step_in_l2_has_the_length_eps() -> None:
    x = interior(4, 3, 5, 5)
    x_adv = FGSM(norm=Norm.l2, eps=0.2)(Affine(3, 75), x, torch.tensor([0, 1, 2, 0]))
    assert torch.allclose((x_adv - x).flatten(1).norm(dim=1), torch.tensor(0.2).double())
