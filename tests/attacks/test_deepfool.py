"""DeepFool against exact minima of linear models and a plain reference in NumPy."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks.attack_loss import Label
from robusttrain.attacks.deepfool import DeepFool
from robusttrain.attacks.model_view import QueryCounter
from robusttrain.errors import InputError
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball
from toys.attacks import Affine, everywhere, interior, tanh_network

DUAL_ORDER = {Norm.linf: 1, Norm.l2: 2, Norm.l1: float("inf")}
ANYWHERE = {Norm.linf: 1.0, Norm.l2: 100.0, Norm.l1: 100.0}
every_norm = pytest.mark.parametrize("norm", list(Norm))


def distances(model: Affine, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
    """Distances to the planes between class y and each class, inf for y itself, (N, K)."""
    logits, weight = model(x), model.weight.detach()
    gaps = logits.gather(1, y[:, None]) - logits
    apart = weight[y][:, None] - weight
    steepness = torch.linalg.vector_norm(apart, ord=DUAL_ORDER[norm], dim=2)
    return torch.where(steepness > 0, gaps / steepness, torch.inf).detach()


def gentle(classes: int) -> tuple[Affine, Tensor, Tensor]:
    """A linear model, and images so near to its boundaries that the box is far away in l1, too."""
    model, x = Affine(classes, 12), interior(8, 1, 3, 4)
    with torch.no_grad():
        model.bias.copy_(0.2 * model.bias - model.weight.sum(1) / 2)
    return model, x, model(x).argmax(1)


@every_norm
@pytest.mark.parametrize("classes", [2, 5])
def test_the_nearest_plane_of_a_linear_model_is_passed_by_the_overshoot(
    classes: int, norm: Norm
) -> None:
    model, x, y = gentle(classes)
    x_adv = DeepFool(norm=norm, eps=ANYWHERE[norm])(model, x, y)
    exact = distances(model, x, y, norm).amin(1)
    near = exact < 0.35
    assert near.sum() >= 5
    assert (model(x_adv).argmax(1) != y).all()
    sizes = ball(Threat(norm, 0)).norm(x_adv - x)
    assert torch.allclose(sizes[near], 1.02 * exact[near], rtol=1e-6, atol=0)


@every_norm
def test_a_ball_that_holds_the_way_is_as_good_as_none_and_a_smaller_one_cuts_it(norm: Norm) -> None:
    model, x, y = gentle(3)
    exact = distances(model, x, y, norm).amin(1)
    eps = float(exact.median()) * 1.1
    x_adv = DeepFool(norm=norm, eps=eps)(model, x, y)
    assert torch.equal(model(x_adv).argmax(1) != y, 1.02 * exact < eps)
    assert (ball(Threat(norm, 0)).norm(x_adv - x) <= eps + 1e-9).all()


def jacobian(network: nn.Module, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(logits (K,), their gradients (K, D)) of W2 tanh(W1 z + b1) + b2, by hand."""
    w1, b1, w2, b2 = (parameter.detach().numpy() for parameter in network.parameters())
    hidden = np.tanh(w1 @ z + b1)
    return w2 @ hidden + b2, (w2 * (1 - hidden**2)) @ w1


def reference(network: nn.Module, x: np.ndarray, y: int, norm: Norm) -> np.ndarray:
    """Algorithm 2 and its general form, away from the box."""
    z = x.copy()
    for _ in range(50):
        logits, slopes = jacobian(network, z)
        if logits.argmax() != y:
            break
        ways = []
        for k in set(range(len(logits))) - {y}:
            f, w = abs(logits[k] - logits[y]), slopes[k] - slopes[y]
            if norm is Norm.linf:
                way = f / np.abs(w).sum() * np.sign(w)
                length = np.abs(way).max()
            elif norm is Norm.l2:
                way = f / (w**2).sum() * w
                length = np.sqrt((way**2).sum())
            else:
                steepest = np.abs(w).argmax()
                way = np.zeros_like(w)
                way[steepest] = f / w[steepest]
                length = np.abs(way).sum()
            ways.append((length, way))
        z = z + 1.02 * min(ways, key=lambda pair: pair[0])[1]
    return z


@every_norm
def test_iterates_are_those_of_the_plain_reference(norm: Norm) -> None:
    network, x = tanh_network(12, 4), interior(10, 1, 3, 4)
    y = network(x).argmax(1)
    x_adv = DeepFool(norm=norm, eps=ANYWHERE[norm])(network, x, y)
    compared = 0
    for i in range(len(x)):
        expected = reference(network, x[i].flatten().numpy(), int(y[i]), norm)
        if expected.min() > 0 and expected.max() < 1:
            assert np.allclose(x_adv[i].flatten().numpy(), expected, rtol=0, atol=1e-6)
            compared += 1
    assert compared >= 5


@every_norm
def test_an_active_box_does_not_stop_the_search(norm: Norm) -> None:
    """In l1 a step along the steepest pixel alone stays at the face that this pixel is at."""
    network, x = tanh_network(12, 3), everywhere(30, 1, 3, 4)
    y = network(x).argmax(1)
    x_adv = DeepFool(norm=norm, eps=ANYWHERE[norm])(network, x, y)
    assert (network(x_adv).argmax(1) != y).float().mean() > 0.9


def test_only_the_best_ranked_classes_are_looked_at() -> None:
    """Class 2 is nearer, class 1 has the larger logit."""
    model = Affine(3, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0], [1.0], [-20.0]]))
        model.bias.copy_(torch.tensor([1.0, 0.25, 10.0]))
    x, y = torch.full((1, 1, 1, 1), 0.5).double(), torch.tensor([0])
    assert model(x).tolist() == [[1.0, 0.75, 0.0]]
    keys = {"norm": Norm.l2, "eps": 1.0}
    assert DeepFool(**keys)(model, x, y).item() == pytest.approx(0.5 - 1.02 * 0.05)
    assert DeepFool(**keys, classes=1)(model, x, y).item() == pytest.approx(0.5 + 1.02 * 0.25)


@every_norm
def test_the_targeted_form_reaches_the_least_likely_class(norm: Norm) -> None:
    network, x = tanh_network(12, 3), interior(10, 1, 3, 4)
    attack = DeepFool(norm=norm, eps=ANYWHERE[norm], label=Label.least_likely)
    logits = network(x)
    reached = network(attack(network, x, logits.argmax(1))).argmax(1) == logits.argmin(1)
    assert reached.float().mean() >= 0.9


def test_images_that_are_wrong_already_stay_and_cost_no_more_than_a_look() -> None:
    sizes: list[int] = []
    network, x = tanh_network(12, 3), interior(10, 1, 3, 4)
    y = network(x).argmax(1)
    y[:4] = (y[:4] + 1) % 3
    network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    x_adv = DeepFool(eps=0.5)(network, x, y)
    assert torch.equal(x_adv[:4], x[:4])
    assert sizes[:3] == [10, 6, 6]
    assert sizes == sorted(sizes, reverse=True)


def test_small_batches_give_the_same_images() -> None:
    network, x = tanh_network(12, 3), everywhere(10, 1, 3, 4)
    y, attack = network(x).argmax(1), DeepFool(eps=0.5)
    metered, graphs = QueryCounter(network, 3), []
    metered.register_forward_pre_hook(
        lambda _, inputs: graphs.append(len(inputs[0]) if torch.is_grad_enabled() else 0)
    )
    with torch.no_grad():
        attack(metered, x, y)
    # No graph is held of more images than are in a batch.
    assert max(graphs) == 3
    assert torch.allclose(attack(metered, x, y), attack(network, x, y), rtol=0, atol=1e-9)
    assert metered.backward_passes > 0


@every_norm
def test_a_model_that_does_not_look_at_its_images_leaves_them(norm: Norm) -> None:
    model, x = Affine(3, 12), everywhere(4, 1, 3, 4)
    model.weight.data.zero_()
    x_adv = DeepFool(norm=norm, eps=ANYWHERE[norm])(model, x, model(x).argmax(1))
    assert torch.allclose(x_adv, x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"classes": 0}, {"overshoot": -0.1}])
def test_impossible_settings_are_refused_by_name(wrong: dict[str, float]) -> None:
    ((key, value),) = wrong.items()
    with pytest.raises(InputError, match=f"^{key}={value} "):
        DeepFool(**wrong)
