"""Gaussian input noise: its distribution, its switches, and what it leaves alone."""

import copy
import io
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn

from robusttrain.attacks import Attack, cross_entropy
from robusttrain.attacks.crafting import Mode, held_still
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.pgd import PGD
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.errors import InputError
from robusttrain.noise import noise_layers, predicts_randomly
from robusttrain.noise.gaussian import Gaussian
from robusttrain.noise.none import NoNoise


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(1), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def noisy(
    sigma: float = 0.5, *, train: bool = True, predict: bool = True, seed: int = 7
) -> nn.Module:
    model = network()
    Gaussian(sigma, train, predict).install(model, seed)
    return model


def identity(sigma: float, seed: int = 7) -> nn.Module:
    model = nn.Sequential(nn.Identity())
    Gaussian(sigma).install(model, seed)
    return model


def images(count: int = 5) -> Tensor:
    return torch.rand(count, 1, 2, 2, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sigma", [0.05, 0.25, 2.0])
def test_the_noise_is_normal_and_never_clipped(sigma: float) -> None:
    for value in (0.0, 1.0):
        x = torch.full((10, 1, 100, 100), value)
        noise = (identity(sigma)(x) - value).double().flatten()
        assert abs(noise.mean()) < 5 * sigma / len(noise) ** 0.5
        assert noise.std() == pytest.approx(sigma, rel=0.01)
        assert kstest(noise.numpy(), "norm", (0, sigma)).pvalue > 1e-4


def test_images_and_passes_get_draws_of_their_own() -> None:
    model, x = identity(1.0), torch.zeros(2, 1, 50, 50)
    passes = torch.cat([model(x) for _ in range(2)]).flatten(1)
    correlation = torch.corrcoef(passes) - torch.eye(4)
    assert correlation.abs().max() < 0.1


def test_the_seed_decides_the_draws() -> None:
    x = images()
    first, again, other = (identity(1.0, seed) for seed in (3, 3, 4))
    for _ in range(3):
        drawn = first(x)
        assert torch.equal(drawn, again(x))
        assert not torch.equal(drawn, other(x))


def test_the_global_random_stream_is_not_touched() -> None:
    torch.manual_seed(0)
    model, x = network(), images()
    before = torch.get_rng_state()
    Gaussian().install(model, 0)
    model(x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    moved = noisy()
    torch.manual_seed(98)
    assert torch.equal(moved(x), noisy()(x))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("predict", [False, True])
def test_each_phase_has_a_switch(train: bool, predict: bool) -> None:
    x = images()
    for mode, on in ((True, train), (False, predict)):
        parts = (noisy(train=train, predict=predict), network())
        assert torch.equal(*(part.train(mode)(x) for part in parts)) is not on
    assert predicts_randomly(parts[0]) is predict


def test_sigma_zero_changes_nothing() -> None:
    x = images()
    assert torch.equal(noisy(0.0)(x), network()(x))


class _ByHand(nn.Module):
    """A model that calls whatever children it finds, in order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Flatten(1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


@pytest.mark.parametrize("make", [network, _ByHand])
def test_a_model_that_calls_all_its_children_is_noisy_once(make: Any) -> None:
    model, plain, x = make().eval(), make().eval(), images()
    Gaussian(0.3, predict=True).install(model, 7)
    noise = torch.empty_like(x).normal_(0, 0.3, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(model(x), plain(x + noise))


def test_the_state_dict_is_that_of_the_model() -> None:
    model, plain = noisy(predict=False), network()
    model(images())
    assert list(model.state_dict()) == list(plain.state_dict())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    again = noisy(predict=False)
    again.load_state_dict(plain.state_dict())
    outputs = [part.eval()(images()) for part in (model, plain, again)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_a_copy_has_noise_of_its_own_in_the_same_state() -> None:
    model, x = noisy(), images()
    model(x)
    twin = copy.deepcopy(model)
    assert [len(noise_layers(part)) for part in (model, twin)] == [1, 1]
    assert noise_layers(twin)[0] is not noise_layers(model)[0]
    assert torch.equal(model(x), twin(x))
    # Silencing one must not silence the other: the hook of the copy belongs to the copy.
    noise_layers(twin)[0].on_train = False
    assert torch.equal(*(twin(x) for _ in range(2)))
    assert not torch.equal(*(model(x) for _ in range(2)))


def test_a_copy_draws_without_moving_the_original() -> None:
    model, reference, x = noisy(), noisy(), images()
    for part in (model, reference):
        part(x)
    copy.deepcopy(model)(x)
    assert torch.equal(model(x), reference(x))


def test_the_noise_is_a_constant_of_the_gradient() -> None:
    x = images().requires_grad_()
    (gradient,) = torch.autograd.grad(identity(1.0)(x).sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


@pytest.mark.parametrize("mode", list(Mode))
def test_crafting_faces_the_noise_of_its_phase(mode: Mode) -> None:
    x = images()
    for training in (True, False):
        model = noisy(train=training, predict=not training).train(training)
        with held_still(model, mode):
            assert cast(nn.Module, model[2]).training is (mode is Mode.train)
            outputs = [model(x) for _ in range(2)]
        assert not torch.equal(*outputs)
        model = noisy(train=not training, predict=training).train(training)
        with held_still(model, mode):
            outputs = [model(x) for _ in range(2)]
        assert torch.equal(*outputs)


class _Seen(nn.Module):
    """Keeps the images that reach the layers behind the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.images.append(x.detach())
        return x


@pytest.mark.parametrize("attack", [FGSM(eps=0.0), PGD(eps=0.0, steps=3)])
def test_every_pass_of_adversarial_training_sees_another_draw(attack: Attack) -> None:
    """With radius 0 all passes get the same images, so whatever differs is noise."""
    seen, x = _Seen(), images()
    model = nn.Sequential(seen, *network()).train()
    Gaussian(0.2).install(model, 7)
    generator = torch.Generator().manual_seed(0)
    list(
        WorstCase(attack)(model, x, torch.zeros(5).long(), loss=cross_entropy, generator=generator)
    )
    assert len(seen.images) > 1
    for one, other in pairwise([x, *seen.images]):
        assert 0.1 < (one - other).std() < 0.4


def test_no_noise_installs_nothing() -> None:
    model = network()
    NoNoise().install(model, 0)
    assert noise_layers(model) == []
    assert not predicts_randomly(model)


@pytest.mark.parametrize("sigma", [-0.1, float("nan"), float("inf")])
def test_sigma_is_a_size(sigma: float) -> None:
    with pytest.raises(InputError, match=r"^sigma=.* is not allowed"):
        Gaussian(sigma)
