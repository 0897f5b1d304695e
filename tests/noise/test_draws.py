"""SmoothAdv: attack and outer loss on the same draws, against formulas of the smoothed loss."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from robusttrain.attacks.attack_loss import Label, attack_loss, cross_entropy
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.model_view import frozen
from robusttrain.attacks.pgd import PGD
from robusttrain.data import as_input
from robusttrain.defenses import Defense
from robusttrain.defenses.alpha_mix import AlphaMix
from robusttrain.defenses.lsa import LSA, Direction
from robusttrain.defenses.rt import RT
from robusttrain.defenses.standard import Standard
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.noise.draws import SameDraws
from robusttrain.noise.gaussian import Gaussian
from robusttrain.noise.pni import PNIWeights
from robusttrain.noise.stack import Stack
from robusttrain.optim.optimizers import SGD
from robusttrain.threat import Norm
from robusttrain.training.engine import Batch
from toys.noise import CLASSES, DATA, SHAPE, Seen, images, network, ready, seeded, trainer

DRAWS, SIGMA = 4, 0.3


def linear(seed: int = 0) -> nn.Sequential:
    """An identity layer after the noise, and a linear classifier with large weights."""
    torch.manual_seed(seed)
    layer = nn.Linear(36, CLASSES)
    with torch.no_grad():
        layer.weight.mul_(10)
    model = nn.Sequential(Seen(), nn.Flatten(1), layer)
    Gaussian(SIGMA, draws=DRAWS).install(model, 7)
    return model


def seen(model: nn.Sequential) -> list[Tensor]:
    """The inputs of the classifier in each pass."""
    witness = model[0]
    assert isinstance(witness, Seen)
    return witness.inputs


def probabilities(model: nn.Sequential, noisy_images: Tensor) -> np.ndarray:
    """Softmax outputs (N, draws, K) of the linear classifier in float64, written out."""
    layer = model[2]
    weight, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
    logits = noisy_images.double().flatten(1).numpy() @ weight.T + bias
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    shares: np.ndarray = shifted / shifted.sum(1, keepdims=True)
    return shares.reshape(-1, DRAWS, CLASSES)


def renewed(model: nn.Module, seed: int = 5) -> SameDraws:
    view = SameDraws(model, DRAWS)
    view.renew(seeded(seed))
    return view


# The wrapper


def test_with_frozen_parameters_it_is_the_log_of_the_mean_softmax() -> None:
    model, x = linear(), images()
    view = renewed(model)
    with frozen(view):
        found = view(x)
    (drawn,) = seen(model)
    assert drawn.shape == (5 * DRAWS, *SHAPE)
    expected = np.log(probabilities(model, drawn).mean(1))
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_each_image_has_its_own_draws() -> None:
    model, x = linear(), images(200)
    renewed(model)(x)
    noise = (seen(model)[0].view(200, DRAWS, -1) - x.flatten(1)[:, None]).flatten(0, 1)
    assert noise.std().item() == pytest.approx(SIGMA, rel=0.02)
    correlation = torch.corrcoef(noise) - torch.eye(200 * DRAWS)
    # Correlations over 36 pixels: none is 1, and their mean is about 0.
    assert correlation.abs().max() < 0.9
    assert correlation.mean().abs() < 0.005


def test_in_training_it_gives_the_logits_of_all_draws() -> None:
    model, x = linear(), images()
    logits = renewed(model)(x)
    expected = np.log(probabilities(model, seen(model)[0])).reshape(-1, CLASSES)
    np.testing.assert_allclose(logits.log_softmax(1).detach().numpy(), expected, atol=1e-3)


def test_logits_far_apart_stay_finite() -> None:
    model = linear()
    with torch.no_grad():
        model[2].weight.mul_(1000)
    view = renewed(model)
    with frozen(view):
        assert view(images()).isfinite().all()


def test_draws_change_only_when_they_are_renewed() -> None:
    model, x = linear(), images()
    view, stream = SameDraws(model, DRAWS), seeded(1)
    for _ in range(2):
        view.renew(stream)
        view(x)
        with frozen(view):
            view(x)
    first, again, other, same = seen(model)
    assert torch.equal(first, again)
    assert torch.equal(other, same)
    assert not torch.equal(first, other)


def test_it_leaves_the_streams_of_the_model_alone() -> None:
    model, reference, x = linear(), linear(), images()
    renewed(model)(x)
    assert torch.equal(model(x), reference(x))


# The attack


def test_the_attack_climbs_the_loss_of_the_mean_softmax() -> None:
    """-log mean_j p_j[y] has the slope sum_j p_j[y] (W^T p_j - W_y) / sum_j p_j[y]."""
    model, x = linear(), images()
    y = torch.arange(5) % CLASSES
    view = renewed(model)
    with frozen(view):
        surrogate = attack_loss(view, x, y, label=Label.given, loss=cross_entropy)
        found = surrogate.evaluate(x)
    p = probabilities(model, seen(model)[0])
    rows = np.arange(5)
    own = p[rows, :, y.numpy()]
    weight = model[2].weight.detach().double().numpy()
    slopes = p @ weight - weight[y.numpy()][:, None]
    gradient = (own[:, :, None] * slopes).sum(1) / own.sum(1)[:, None]
    np.testing.assert_allclose(found.value.numpy(), -np.log(own.mean(1)), rtol=1e-4)
    np.testing.assert_allclose(
        found.gradient.flatten(1).numpy(), gradient, rtol=1e-3, atol=1e-4 * abs(gradient).max()
    )
    # It differs from the gradient of the mean loss.
    assert abs(gradient - slopes.mean(1)).max() > 0.1 * abs(gradient).max()


def test_a_step_in_l2_follows_that_gradient() -> None:
    model, x = linear(), images()
    y = torch.arange(5) % CLASSES
    view = renewed(model)
    attack = PGD(Norm.l2, 1e-3, steps=1, step_size=1e-3, random_start=False)
    x_adv = attack(view, x, y, generator=seeded(0))
    with frozen(view):
        surrogate = attack_loss(view, x, y, label=Label.given, loss=cross_entropy)
        gradient = surrogate.evaluate(x).gradient
    inside = ((x > 1e-3) & (x < 1 - 1e-3)).flatten(1).all(1)
    step, slope = ((x_adv - x)[inside], gradient[inside])
    cosine = torch.cosine_similarity(step.flatten(1), slope.flatten(1))
    assert inside.any()
    assert cosine.min() > 0.999


# Training


@dataclass
class Noting(Standard):
    """Standard training that keeps the labels of each batch."""

    labels: list[Tensor]

    def inner(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Tensor:
        self.labels.append(y)
        return x


def mean_loss(model: nn.Sequential, drawn: Tensor, y: Tensor) -> float:
    """The mean over images and draws of the cross-entropy."""
    p = probabilities(model, drawn)
    return float(-np.log(p[np.arange(len(y)), :, y.numpy()]).mean())


def test_the_outer_loss_is_the_mean_over_the_same_draws() -> None:
    model, reference = linear(), linear()
    made = trainer(model, WorstCase(PGD(eps=0.1, steps=3)))
    x, y = images(8), torch.arange(8) % CLASSES
    made.model.train()
    (objective,) = made.engine.train_batch(made.defense, Batch(x, y), made.history)
    drawn = seen(model)
    assert len(drawn) == 4
    # The reference has the weights before the step.
    assert objective.loss.item() == pytest.approx(mean_loss(reference, drawn[-1], y), rel=1e-4)


def test_a_batch_keeps_its_draws_and_the_next_one_gets_others() -> None:
    """With radius 0 all passes of a batch get the same images, and the same noise."""
    model = linear()
    made = trainer(model, WorstCase(PGD(eps=0.0, steps=3)))
    x, y = images(8), torch.arange(8) % CLASSES
    for _ in range(2):
        made.engine.train_batch(made.defense, Batch(x, y), made.history)
    drawn = seen(model)
    assert len(drawn) == 8
    for batch in (drawn[:4], drawn[4:]):
        for one, other in pairwise(batch):
            assert torch.equal(one, other)
    assert not torch.equal(drawn[0], drawn[4])


def test_accuracies_of_an_epoch_are_shares_over_draws() -> None:
    model, labels = linear(), []
    made = trainer(model, Noting(labels), optimizer=SGD(1e-12), batch_size=40)
    (epoch,) = made.epochs()
    right = [
        probabilities(model, drawn).argmax(2) == y.numpy()[:, None]
        for drawn, y in zip(seen(model), labels, strict=True)
    ]
    assert [len(batch) for batch in right] == [40, 24]
    shares = np.concatenate(right).mean(1)
    assert set(np.unique(shares)) - {0, 1}, "the test needs images on which draws differ"
    assert epoch.train_clean_accuracy == pytest.approx(shares.mean(), abs=1e-9)
    assert epoch.train_robust_accuracy is None


def test_label_smoothing_applies_to_each_draw() -> None:
    model = linear()
    made = trainer(model, Standard(), label_smoothing=0.3)
    x, y = images(8), torch.arange(8) % CLASSES
    weight, bias = (p.detach().clone() for p in model[2].parameters())
    (objective,) = made.engine.train_batch(made.defense, Batch(x, y), made.history)
    logits = seen(model)[0].flatten(1) @ weight.T + bias
    expected = F.cross_entropy(logits, y.repeat_interleave(DRAWS), label_smoothing=0.3)
    assert objective.loss.item() == pytest.approx(expected.item(), rel=1e-5)


# Each defense with its number of forward passes.
DEFENSES: list[tuple[Defense, int]] = [
    (Standard(), 1),
    (AlphaMix(PGD(steps=3)), 5),
    (AlphaMix(FGSM()), 3),
    (RT(), 1),
    (WorstCase(FGSM()), 2),
    (LSA(direction=Direction.loss), 2),
    (LSA(direction=Direction.alpha), 2),
    (WorstCase(PGD(steps=3)), 4),
    (WorstCase(PGD(Norm.l2, 0.5, steps=3)), 4),
]


@pytest.mark.parametrize(("defense", "expected"), DEFENSES)
@pytest.mark.parametrize(
    "noise",
    [
        lambda: Gaussian(SIGMA, draws=2),
        lambda: Stack({"input": Gaussian(SIGMA, draws=2, at="first"), "weights": PNIWeights()}),
    ],
)
def test_every_defense_trains_on_draws(
    defense: Defense, expected: int, noise: Callable[[], Any]
) -> None:
    model = ready(network(), noise())
    passes: Counter[int] = Counter()
    model[0].register_forward_pre_hook(  # type: ignore[index]
        lambda module, inputs: passes.update([len(inputs[0])])
    )
    before = [p.detach().clone() for p in model.parameters()]
    made = trainer(model, defense)
    made.model.train()
    images_, labels = DATA.load()[0].take(torch.arange(8))
    (objective,) = made.engine.train_batch(defense, Batch(as_input(images_), labels), made.history)
    assert objective.loss.isfinite()
    assert passes == Counter({8 * 2: expected})
    for p, old in zip(model.parameters(), before, strict=True):
        assert p.isfinite().all()
        assert not torch.equal(p, old)
