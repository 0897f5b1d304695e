"""FARE against its formula in float64: features that stay near the original ones, no labels."""

import copy
from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks import Attack
from robusttrain.attacks.apgd import APGD
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.friendly import FriendlyPGD
from robusttrain.attacks.pgd import PGD
from robusttrain.attacks.square import Square
from robusttrain.attacks.transfer import Transfer
from robusttrain.data import Split
from robusttrain.defenses.fare import FARE
from robusttrain.errors import InputError
from robusttrain.noise.gaussian import Gaussian
from robusttrain.optim.averaging import EMA
from robusttrain.optim.optimizers import SGD
from robusttrain.optim.weight_perturbation import AWP
from robusttrain.threat import Norm
from robusttrain.training.curriculum import Curriculum
from robusttrain.training.settings import Training
from robusttrain.training.trainable import partly_frozen
from robusttrain.training.trainer import Trainer
from toys import training
from toys.defenses import CLASSES, Array, Fixed, batch, generator, network
from toys.training import DATA, EPS, state_of, trainer

NEARBY, _ = batch(seed=5)
ORIGINAL = 7


def moved(attack: Attack) -> tuple[FARE, nn.Sequential]:
    """The defense of a network that had the weights of ORIGINAL, and has others now."""
    model = network(ORIGINAL)
    defense = FARE(attack).with_original(model, CLASSES)
    model.load_state_dict(network().state_dict())
    return defense, model


def loss_of(defense: FARE, model: nn.Module, x: Tensor) -> Tensor:
    y = torch.zeros(len(x), dtype=torch.int64)
    found = defense.inner(model, x, y, generator=generator())
    return defense.outer(model, x, found, y, loss=lambda *_: pytest.fail("no loss is read")).loss


def hidden(x: Tensor, seed: int = 0) -> Array:
    """tanh(W x + b) of `network`, in NumPy."""
    weight, bias, *_ = (p.detach().numpy() for p in network(seed).parameters())
    return np.asarray(np.tanh(x.flatten(1).numpy() @ weight.T + bias))


def test_the_loss_and_its_gradient_are_those_of_the_formula() -> None:
    x, _ = batch()
    defense, model = moved(Fixed(NEARBY))
    loss = loss_of(defense, model, x)
    loss.backward()  # type: ignore[no-untyped-call]
    apart = hidden(NEARBY) - hidden(x, ORIGINAL)
    assert loss.item() == pytest.approx(np.square(apart).sum(1).mean(), rel=1e-12)
    slope = 2 * apart * (1 - hidden(NEARBY) ** 2) / len(x)
    weight, bias, *head = model.parameters()
    np.testing.assert_allclose(weight.grad, slope.T @ NEARBY.flatten(1).numpy(), rtol=1e-10)
    np.testing.assert_allclose(bias.grad, slope.sum(0), rtol=1e-10)
    assert all(parameter.grad is None for parameter in head)


def test_the_attack_climbs_the_distance_from_the_original_features() -> None:
    x, y = batch()
    attack = Fixed(NEARBY)
    loss_of(*moved(attack), x)
    here = torch.from_numpy(hidden(NEARBY))
    expected = np.square(hidden(NEARBY) - hidden(x, ORIGINAL)).sum(1)
    np.testing.assert_allclose(attack.loss(here, y), expected, rtol=1e-12)
    some = torch.tensor([4, 1])
    np.testing.assert_allclose(attack.loss.take(some)(here[some], y[some]), expected[[4, 1]])


# The largest change of <w, x> in a ball of radius 1.
LARGEST = {
    Norm.linf: lambda w: np.abs(w).sum(),
    Norm.l2: lambda w: np.sqrt(np.square(w).sum()),
    Norm.l1: lambda w: np.abs(w).max(),
}


@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize("restarts", [1, 2])
def test_the_maximum_of_one_linear_feature_is_its_closed_form(norm: Norm, restarts: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder, head = nn.Linear(6, 1, dtype=torch.float64), nn.Linear(1, CLASSES).double()
    model = nn.Sequential(nn.Flatten(1), encoder, head)
    # A long step leaves nothing of the random start.
    attack = PGD(norm, 0.05, steps=15, step_size=0.5, restarts=restarts)
    defense = FARE(attack).with_original(model, CLASSES)
    # No image is near the edges of the box.
    x = 0.3 + 0.4 * batch()[0]
    expected = (0.05 * LARGEST[norm](encoder.weight.detach().numpy())) ** 2
    assert loss_of(defense, model, x).item() == pytest.approx(expected, rel=1e-6)


def test_at_radius_zero_the_loss_of_the_original_model_is_zero() -> None:
    model = network()
    defense = FARE(PGD(eps=0.0, steps=2)).with_original(model, CLASSES)
    assert loss_of(defense, model, batch()[0]).item() == 0


def test_the_original_features_are_in_eval_mode_and_without_noise() -> None:
    x, _ = batch()
    model = network().insert(3, nn.Dropout(0.5)).train()
    Gaussian(0.3, predict=True, draws=3).install(model, 0)
    defense = FARE(Fixed(NEARBY)).with_original(model, CLASSES)
    found = defense.inner(model, x, torch.zeros(len(x)), generator=generator())
    np.testing.assert_allclose(found.target, hidden(x), rtol=1e-12)
    assert all(module.training for module in model.modules())


# Trainings


def begun(model: nn.Module, defense: FARE, **keys: Any) -> Trainer:
    return trainer(defense, model=model, optimizer=SGD(0.1, weight_decay=0.1), **keys)


def fare(**keys: Any) -> FARE:
    return FARE(PGD(eps=EPS, steps=2, **keys))


EVERYTHING: dict[str, Any] = {
    "averaging": EMA(0.5),
    "weight_perturbation": AWP(0.1),
    "curriculum": Curriculum(eps_warmup=0.5, per_batch=True),
}


def test_the_head_stays_bit_for_bit_and_the_original_with_it() -> None:
    model = training.network()
    before = copy.deepcopy(model.state_dict())
    defense = fare().with_original(model, 3)
    with partly_frozen(model, Training(), 3, defense):
        list(begun(model, defense, **EVERYTHING).epochs())
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in ("4.weight", "4.bias"))
    assert not torch.equal(after["1.weight"], before["1.weight"])
    original = defense.state_dict()["original"]
    assert all(torch.equal(original[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("restarts", [1, 2])
def test_labels_play_no_part(restarts: int) -> None:
    """The attack with restarts scores its points, and drops no image for being misclassified."""
    split, weights = DATA.load()[0], []
    for labels in (split.labels, split.labels.roll(1)):
        model = training.network()
        defense = fare(restarts=restarts).with_original(model, 3)
        with partly_frozen(model, Training(), 3, defense):
            made = begun(model, defense, train=Split(split.images, labels), epochs=1)
            epochs = list(made.epochs())
        weights.append(state_of(model))
        assert epochs[0].train_pgd_accuracy is None
    assert torch.equal(*weights)


def test_a_resumed_training_keeps_the_same_original() -> None:
    def started(seed: int) -> tuple[nn.Module, FARE]:
        model = training.network(seed)
        return model, fare().with_original(model, 3)

    # A run that is resumed builds a new network first.
    (whole, one), (again, other) = started(0), started(1)
    with partly_frozen(whole, Training(), 3, one), partly_frozen(again, Training(), 3, other):
        first = begun(whole, one, **EVERYTHING)
        running = first.batches()
        list(islice(running, 5))
        state: Mapping[str, Any] = copy.deepcopy(
            {"model": whole.state_dict(), **first.state_dict()}
        )
        list(running)
        again.load_state_dict(state["model"])
        second = begun(again, other, **EVERYTHING)
        second.load_state_dict(state)
        list(second.batches())
        with first.averaged(), second.averaged():
            assert torch.equal(state_of(whole), state_of(again))
    assert torch.equal(state_of(whole), state_of(again))
    originals = (defense.state_dict()["original"] for defense in (one, other))
    first_weights, second_weights = (
        torch.cat([v.flatten() for v in o.values()]) for o in originals
    )
    assert torch.equal(first_weights, second_weights)


# Refusals

REFUSED = {
    r"attack=Square .*climbs": Square(),
    r"attack\.label=predicted": PGD(label="predicted"),
    r"attack\.random_start=False": FGSM(),
    r"attack=Transfer .*on the model that is trained": Transfer(network(), PGD()),
    r"attack=FriendlyPGD .*without regard to labels": FriendlyPGD(),
    r"attack=PGD .*without regard to labels": PGD(stop_early=True),
    r"attack=APGD .*without regard to labels": APGD(far=0.5),
}


@pytest.mark.parametrize("message", REFUSED)
def test_attacks_that_cannot_climb_the_distance_are_refused(message: str) -> None:
    with pytest.raises(InputError, match=rf"^{message}"):
        FARE(REFUSED[message])


@pytest.mark.parametrize("chosen", ["head", "4.*"])
def test_a_training_of_the_head_alone_is_refused(chosen: str) -> None:
    model = training.network()
    message = r"^training\.trainable=.* leaves nothing to train: .*before the head"
    with (
        pytest.raises(InputError, match=message),
        partly_frozen(model, Training(trainable=chosen), 3, fare()),
    ):
        pytest.fail("accepted")
