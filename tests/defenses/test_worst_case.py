"""PGD adversarial training where the inner maximum is known: two classes, one affine layer."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from robusttrain.attacks.pgd import PGD
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.threat import Norm
from toys.defenses import asked

EPS = 0.1
DUAL_ORDER = {Norm.linf: 1, Norm.l2: 2, Norm.l1: float("inf")}

every_norm = pytest.mark.parametrize("norm", list(Norm))


def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(1), nn.Linear(12, 2)).double()
    x = 0.3 + 0.4 * torch.rand(16, 1, 3, 4, dtype=torch.float64)
    return model, x, torch.arange(16) % 2


def worst_loss(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
    """softplus(-(margin - eps |w_0 - w_1|_dual)): the ball takes that much from every margin."""
    sign = 1 - 2 * y.double()
    normal = weight[0] - weight[1]
    margin = sign * (x.flatten(1) @ normal + bias[0] - bias[1])
    return F.softplus(EPS * torch.linalg.vector_norm(normal, DUAL_ORDER[norm]) - margin).mean()


@every_norm
def test_the_loss_and_its_gradient_are_those_of_the_worst_point(norm: Norm) -> None:
    model, x, y = problem()
    defense = WorstCase(PGD(norm=norm, eps=EPS, steps=20, step_size=2 * EPS))
    generator = torch.Generator().manual_seed(1)
    objective = asked(defense, model, x, y, draws=generator)
    found = torch.autograd.grad(objective.loss, list(model.parameters()))
    layer = model[1]
    assert isinstance(layer, nn.Linear)
    worst = worst_loss(layer.weight, layer.bias, x, y, norm)
    assert objective.loss.item() <= worst.item() + 1e-12
    assert objective.loss.item() == pytest.approx(worst.item(), rel=1e-6)
    # Danskin: the gradient at the maximiser, held constant, is that of the maximum.
    expected = torch.autograd.grad(worst, [layer.weight, layer.bias])
    for mine, closed in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, closed, rtol=1e-5, atol=1e-7)
