"""GradAlign where the angle between gradients is known: a quadratic logit, and a linear one."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks import cross_entropy
from robusttrain.defenses.grad_align import GradAlign, misalignment
from robusttrain.errors import InputError
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball
from toys.defenses import asked

PIXELS, EPS = 6, 0.2


class Quadratic(nn.Module):
    """Logits x^T A x / 2 and 0: the input gradient of the loss is along +-A x."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        half = torch.randn(PIXELS, PIXELS, generator=draws, dtype=torch.float64)
        self.matrix = nn.Parameter(half + half.T)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        value = ((flat @ self.matrix) * flat).sum(1) / 2
        return torch.stack([value, torch.zeros_like(value)], 1)


def batch() -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(1)
    x = 0.3 + 0.4 * torch.rand(5, 1, 2, 3, generator=draws, dtype=torch.float64)
    return x, torch.arange(5) % 2


def offset(norm: Norm) -> Tensor:
    return ball(Threat(norm, EPS)).random_offset(batch()[0], torch.Generator().manual_seed(3))


def objective(model: nn.Module, norm: Norm, weight: float) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    defense = GradAlign(norm, EPS, weight)
    return asked(defense, model, *batch(), draws=generator).loss


def one_minus_cosine(first: Tensor, matrix: Tensor, norm: Norm) -> Tensor:
    """1 - cos between `first` and A (x + n), on average."""
    x = batch()[0]
    second = ((x + offset(norm)).flatten(1) @ matrix).numpy()
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return torch.tensor(1 - ((first.numpy() * second).sum(1) / lengths)).mean()


@pytest.mark.parametrize("norm", list(Norm))
def test_the_regulariser_and_its_gradient_are_those_of_a_quadratic(norm: Norm) -> None:
    model = Quadratic()
    parts = [objective(model, norm, weight) for weight in (0.0, 1.0)]
    matrix = model.matrix.detach()
    first = batch()[0].flatten(1) @ matrix
    found = parts[1] - parts[0]
    assert found.item() == pytest.approx(one_minus_cosine(first, matrix, norm).item(), rel=1e-9)
    assert found > 1e-4
    (slope,) = torch.autograd.grad(found, model.matrix)
    # The loss of the model sees the symmetric part of A alone; the gradient at x is a constant.
    step, differences = 1e-6, torch.zeros_like(matrix)
    for i in range(PIXELS):
        for j in range(PIXELS):
            bump = torch.zeros_like(matrix)
            bump[i, j] += step / 2
            bump[j, i] += step / 2
            ends = [one_minus_cosine(first, matrix + sign * bump, norm) for sign in (1, -1)]
            differences[i, j] = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close(slope, differences, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("norm", list(Norm))
def test_without_the_regulariser_it_trains_on_the_step_of_fgsm(norm: Norm) -> None:
    model, (x, y) = Quadratic(), batch()
    sign = torch.where(y == 0, -1.0, 1.0).double()[:, None]
    slope = (sign * (x.flatten(1) @ model.matrix.detach())).view_as(x)
    x_adv = ball(Threat(norm, EPS)).linear_maximiser(slope, x)
    expected = cross_entropy(model(x_adv), y).mean()
    torch.testing.assert_close(objective(model, norm, 0.0), expected, rtol=1e-12, atol=0)


def test_a_linear_model_of_two_classes_is_aligned() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(1), nn.Linear(PIXELS, 2)).double()
    parts = [objective(model, Norm.linf, weight) for weight in (0.0, 1.0)]
    assert (parts[1] - parts[0]).item() == pytest.approx(0, abs=1e-12)


def test_faint_gradients_have_their_angle_and_zero_ones_none() -> None:
    first = torch.tensor([[3e-30, 4e-30], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    second = torch.tensor([[4e-25, 3e-25], [0.0, 2.0], [1.0, 1.0], [0.0, 0.0]]).requires_grad_()
    found = misalignment(first, second)
    assert found.item() == pytest.approx((1 - 24 / 25 + 1) / 2, rel=1e-5)
    (slope,) = torch.autograd.grad(found, second)
    assert slope[1:].isfinite().all()
    assert misalignment(torch.zeros(2, 3), torch.ones(2, 3)) == 0


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"^weight=-1 is not allowed"):
        GradAlign(weight=-1)
    with pytest.raises(InputError, match=r"^eps=-1 is not allowed"):
        GradAlign(eps=-1)
