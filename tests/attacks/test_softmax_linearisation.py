import numpy as np
import pytest
import torch

from robusttrain.attacks.attack_loss import Label
from robusttrain.attacks.softmax_linearisation import SoftmaxLinearisation
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball
from toys.attacks import Affine, everywhere, interior

DUAL_ORDER = {Norm.linf: 1, Norm.l2: 2, Norm.l1: np.inf}
every_norm = pytest.mark.parametrize("norm", list(Norm))


@every_norm
def test_heads_for_the_class_that_the_linearised_softmax_reaches_first(norm: Norm) -> None:
    """Huang et al. 2016, Algorithm 1, image by image with the softmax derivative by hand."""
    eps, model, x = 0.1, Affine(5, 12), everywhere(30, 1, 3, 4)
    y = model(x).argmax(1)
    x_adv = SoftmaxLinearisation(norm=norm, eps=eps)(model, x, y)
    weight = model.weight.detach().numpy()
    chosen = set()
    for i in range(len(x)):
        a = model(x[i : i + 1]).softmax(1)[0].detach().numpy()
        jacobian = (np.diag(a) - np.outer(a, a)) @ weight
        own = int(y[i])
        distances = {
            j: (a[own] - a[j]) / np.linalg.norm(jacobian[j] - jacobian[own], ord=DUAL_ORDER[norm])
            for j in range(5)
            if j != own
        }
        nearest = min(distances, key=lambda j: distances[j])
        chosen.add(nearest)
        way = torch.from_numpy(jacobian[nearest] - jacobian[own]).view(1, 1, 3, 4)
        expected = ball(Threat(norm, eps)).linear_maximiser(way, x[i : i + 1])
        assert torch.allclose(x_adv[i : i + 1], expected, rtol=0, atol=1e-9)
    assert len(chosen) > 1


@every_norm
def test_a_targeted_step_gains_on_the_rival_that_is_hardest_to_overtake(norm: Norm) -> None:
    model, x = Affine(4, 12), everywhere(12, 1, 3, 4)
    outputs = model(x).softmax(1)
    attack = SoftmaxLinearisation(norm=norm, eps=0.01, label=Label.least_likely)
    after = model(attack(model, x, outputs.argmax(1))).softmax(1)
    weight = model.weight.detach().numpy()
    for i in range(len(x)):
        a = outputs[i].detach().numpy()
        jacobian, target = (np.diag(a) - np.outer(a, a)) @ weight, int(a.argmin())
        way = {
            j: (a[j] - a[target])
            / np.linalg.norm(jacobian[j] - jacobian[target], ord=DUAL_ORDER[norm])
            for j in range(4)
            if j != target
        }
        rival = max(way, key=lambda j: way[j])
        assert after[i, target] - after[i, rival] > outputs[i, target] - outputs[i, rival]


def test_a_class_that_does_not_move_is_no_goal() -> None:
    """Classes 0 and 2 have the same weights: in logits nothing moves one against the other."""
    model, x = Affine(3, 4), interior(4, 1, 2, 2)
    with torch.no_grad():
        model.weight[0] = model.weight[2] = 0.0
        model.bias.copy_(torch.tensor([1.0, 0.0, 1.0]))
    y = torch.zeros(4, dtype=torch.int64)
    x_adv = SoftmaxLinearisation(eps=0.1)(model, x, y)
    expected = x + 0.1 * model.weight[1].sign().view(1, 1, 2, 2)
    assert torch.allclose(x_adv, expected)
