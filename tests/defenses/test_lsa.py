"""LSA and the one-step worst case against perturbations worked out by hand in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.softmax_linearisation import SoftmaxLinearisation
from robusttrain.defenses import Defense
from robusttrain.defenses.lsa import LSA, Direction
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.errors import InputError
from robusttrain.threat import Norm
from toys.defenses import asked

Array = NDArray[np.float64]
CLASSES, PIXELS, COUNT, EPS = 3, 8, 24, 0.1

every_norm = pytest.mark.parametrize("norm", list(Norm))


def one_hot_sign(g: Array) -> Array:
    largest = np.abs(g).argmax()
    return np.sign(g) * (np.arange(len(g)) == largest)


STEEPEST: dict[Norm, Callable[[Array], Array]] = {
    Norm.linf: np.sign,
    Norm.l2: lambda g: g / np.sqrt((g**2).sum()),
    Norm.l1: one_hot_sign,
}


def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(3)
    layer = nn.Linear(PIXELS, CLASSES)
    # Weights of different sizes, so that the nearest class is not always the runner-up.
    layer.weight.detach().mul_(torch.tensor([[1.0], [0.3], [2.0]]))
    model = nn.Sequential(nn.Flatten(1), layer).double()
    # Away from the edges of the box, so that only the ball matters.
    x = 0.3 + 0.4 * torch.rand(COUNT, 1, 2, 4, dtype=torch.float64)
    return model, x, torch.arange(COUNT) % CLASSES


def softmax(logits: Array) -> Array:
    p = np.exp(logits - logits.max())
    return np.asarray(p / p.sum())


def numbers() -> tuple[Array, Array, Array, NDArray[np.int64]]:
    model, x, y = problem()
    layer = model[1]
    assert isinstance(layer, nn.Linear)
    flat = x.flatten(1).numpy()
    return layer.weight.detach().numpy(), layer.bias.detach().numpy(), flat, y.numpy()


def loss_direction(p: Array, y: int, weight: Array, norm: Norm) -> Array:
    return STEEPEST[norm]((p - np.eye(CLASSES)[y]) @ weight)


def alpha_direction(p: Array, y: int, weight: Array, norm: Norm) -> Array:
    """Algorithm 1 of the paper with H_k = p_k (W_k - sum_j p_j W_j)."""
    jacobian = p[:, None] * (weight - p @ weight)
    ways: list[tuple[float, Array]] = []
    for j in {0, 1, 2} - {y}:
        slope = jacobian[j] - jacobian[y]
        direction = STEEPEST[norm](slope)
        ways.append((float((p[y] - p[j]) / (slope @ direction)), direction))
    return min(ways, key=lambda way: way[0])[1]


def worst_loss(direction: Callable[[Array, int, Array, Norm], Array], norm: Norm) -> float:
    weight, bias, x, y = numbers()
    losses = []
    for image, label in zip(x, y, strict=True):
        p = softmax(weight @ image + bias)
        moved = image + EPS * direction(p, label, weight, norm)
        losses.append(-np.log(softmax(weight @ moved + bias)[label]))
    return float(np.mean(losses))


def loss_and_gradient(defense: Defense) -> tuple[Tensor, Tensor]:
    model, x, y = problem()
    objective = asked(defense, model, x, y)
    slopes = torch.autograd.grad(objective.loss, list(model.parameters()))
    return objective.loss.detach(), torch.cat([slope.flatten() for slope in slopes])


@every_norm
def test_direction_loss_is_the_maximiser_of_the_linearised_loss(norm: Norm) -> None:
    loss, _ = loss_and_gradient(LSA(norm, EPS, Direction.loss))
    assert loss.item() == pytest.approx(worst_loss(loss_direction, norm), rel=1e-12)


@every_norm
def test_direction_alpha_is_algorithm_1(norm: Norm) -> None:
    loss, _ = loss_and_gradient(LSA(norm, EPS, Direction.alpha))
    assert loss.item() == pytest.approx(worst_loss(alpha_direction, norm), rel=1e-12)


@every_norm
def test_the_two_directions_differ(norm: Norm) -> None:
    """Otherwise the tests above could not tell them apart."""
    assert worst_loss(loss_direction, norm) != worst_loss(alpha_direction, norm)


@every_norm
@pytest.mark.parametrize(
    ("direction", "attack"),
    [(Direction.loss, FGSM), (Direction.alpha, SoftmaxLinearisation)],
)
def test_lsa_is_the_worst_case_of_its_attack(
    norm: Norm, direction: Direction, attack: type[FGSM]
) -> None:
    lsa = loss_and_gradient(LSA(norm, EPS, direction))
    worst = loss_and_gradient(WorstCase(attack(norm=norm, eps=EPS)))
    assert torch.equal(lsa[0], worst[0])
    assert torch.equal(lsa[1], worst[1])


def test_a_negative_radius_is_refused() -> None:
    with pytest.raises(InputError, match=r"^eps=-1 is not allowed"):
        LSA(eps=-1)
