"""Labels, predictions and the surrogate that attacks climb."""

import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks.attack_loss import Label, attack_loss, cross_entropy
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.model_view import predictions
from robusttrain.attacks.pgd import PGD
from toys.attacks import everywhere, tanh_network

INF = float("inf")


def test_cross_entropy_is_that_of_each_image() -> None:
    logits = torch.tensor([[0.0, 0.0], [2.0, -1.0]])
    expected = [torch.tensor(2.0).log().item(), torch.tensor(-3.0).exp().log1p().item()]
    assert cross_entropy(logits, torch.tensor([1, 0])).tolist() == pytest.approx(expected)


def test_outputs_that_are_no_numbers_are_never_right() -> None:
    rows = [[1.0, 2.0], [float("nan"), 0.0], [0.0, float("nan")], [INF, 0.0], [-INF, 0.0]]
    assert predictions(torch.tensor(rows)).tolist() == [1, -1, -1, -1, -1]


def setting() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A network, images, labels that are right for two thirds, and the predicted ones."""
    network, x = tanh_network(12, 4), everywhere(30, 1, 3, 4)
    predicted = network(x).argmax(1)
    y = torch.where(torch.arange(30) % 3 == 0, (predicted + 1) % 4, predicted)
    return network, x, y, predicted


@pytest.mark.parametrize("label", [Label.predicted, "predicted"])
def test_predicted_and_true_labels_differ_where_the_model_is_wrong(label: Label) -> None:
    """Plain words mean the same as members."""
    network, x, y, predicted = setting()
    from_true = FGSM(eps=0.1)(network, x, y)
    from_predicted = FGSM(eps=0.1, label=label)(network, x, y)
    same = (from_true == from_predicted).flatten(1).all(1)
    assert torch.equal(same, y == predicted)
    assert torch.equal(from_predicted, FGSM(eps=0.1)(network, x, predicted))


def test_the_true_label_does_not_leak_into_the_other_choices() -> None:
    network, x, y, _ = setting()
    for label in (Label.predicted, Label.least_likely):
        attack = FGSM(eps=0.1, label=label)
        assert torch.equal(attack(network, x, y), attack(network, x, (y + 1) % 4))


@pytest.mark.parametrize("label", [Label.least_likely, "least_likely"])
@pytest.mark.parametrize("attack", [FGSM, PGD])
def test_least_likely_is_approached(attack: type, label: Label) -> None:
    network, x, y, _ = setting()
    target = network(x).argmin(1, keepdim=True)
    x_adv = attack(eps=0.05, label=label)(network, x, y)
    before, after = (network(images).softmax(1).gather(1, target) for images in (x, x_adv))
    assert (after > before).all()


def test_success_is_leaving_the_label_or_reaching_the_target() -> None:
    network, x, y, predicted = setting()
    logits = network(x)
    for label, expected in (
        (Label.given, y != predicted),
        (Label.predicted, torch.zeros(30, dtype=torch.bool)),
        (Label.least_likely, torch.zeros(30, dtype=torch.bool)),
    ):
        surrogate = attack_loss(network, x, y, label=label, loss=cross_entropy)
        assert torch.equal(surrogate.succeeded(logits), expected)
    targeted = attack_loss(network, x, y, label=Label.least_likely, loss=cross_entropy)
    assert targeted.succeeded(-logits).all()
    assert targeted.succeeded(logits * torch.nan).logical_not().all()


def test_the_gradient_is_that_of_the_loss() -> None:
    network, x, y, _ = setting()
    surrogate = attack_loss(network, x, y, label=Label.given, loss=cross_entropy)
    gradient, value, logits, usable = surrogate.evaluate(x)
    assert usable.all()
    assert torch.equal(logits, network(x))
    assert torch.equal(value, cross_entropy(logits, y))
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    there, back = (surrogate.score(x + h * step)[0] for h in (1e-5, -1e-5))
    slope = (gradient * step).flatten(1).sum(1)
    assert torch.allclose((there - back) / 2e-5, slope, rtol=1e-6, atol=1e-8)


def test_some_images_keep_their_labels() -> None:
    network, x, y, _ = setting()
    rows = torch.tensor([4, 0, 7])
    whole = attack_loss(network, x, y, label=Label.least_likely, loss=cross_entropy)
    part = whole.take(rows)
    assert torch.allclose(part.evaluate(x[rows]).value, whole.evaluate(x).value[rows])
