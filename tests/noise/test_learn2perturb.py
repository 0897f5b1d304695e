"""Learn2Perturb: a learnable sigma for every activation, and its penalty."""

import copy
import math

import pytest
import torch
from scipy.stats import kstest
from torch import nn

from robusttrain.noise.layer import NoiseLayer, Progress, noise_layers, penalty
from robusttrain.noise.learn2perturb import Learn2Perturb
from toys.noise import images, layer_of, network, ready


def sigmas(model: nn.Module) -> list[nn.Parameter]:
    """The logarithms of the sigmas, one tensor for each convolution."""
    return [p for layer in noise_layers(model) for p in layer.parameters()]


def one_convolution(initial: float) -> nn.Module:
    """A model that only adds the noise to its images."""
    convolution = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(convolution.weight)
    model = nn.Sequential(convolution)
    Learn2Perturb(initial).install(model, 3)
    return model


def test_every_activation_of_every_convolution_has_its_own_sigma() -> None:
    model = ready(network(), Learn2Perturb(0.3))
    assert [p.shape for p in sigmas(model)] == [(4, 6, 6), (4, 2, 2)]
    for p in sigmas(model):
        torch.testing.assert_close(p.exp(), torch.full_like(p, 0.3))
        assert p.requires_grad


@pytest.mark.parametrize("train", [False, True])
def test_the_noise_is_normal_with_the_sigma_of_its_place(train: bool) -> None:
    model, x = one_convolution(0.3).train(train), torch.rand(2000, 1, 5, 5)
    model(x[:1])
    (log_sigma,) = sigmas(model)
    wanted = torch.linspace(0.1, 2.0, 25).view(1, 5, 5)
    with torch.no_grad():
        log_sigma.copy_(wanted.log())
        noise = (model(x) - x) / wanted
    assert kstest(noise.flatten().numpy(), "norm").pvalue > 1e-4
    torch.testing.assert_close(noise.std(0), torch.ones(1, 5, 5), rtol=0.1, atol=0)


def test_the_gradient_reaches_each_sigma_through_its_own_noise() -> None:
    model, x = one_convolution(0.3), torch.rand(4, 1, 5, 5)
    output = model(x)
    output.sum().backward()
    (log_sigma,) = sigmas(model)
    assert log_sigma.grad is not None
    torch.testing.assert_close(log_sigma.grad, (output - x).sum(0))


@pytest.mark.parametrize("epoch", [1, 2, 3, 10])
def test_the_penalty_is_that_of_the_paper(epoch: int) -> None:
    """-gamma / tau sum(sqrt(sigma)), tau the harmonic sum up to the epoch (equations 5 and 6)."""
    model = ready(network(), Learn2Perturb(gamma=0.02))
    with torch.no_grad():
        for p in sigmas(model):
            p.uniform_(-3, 1, generator=torch.Generator().manual_seed(1))
    found = penalty(model, Progress(epoch, 12345))
    roots = sum(math.sqrt(math.exp(v)) for p in sigmas(model) for v in p.flatten().tolist())
    harmonic = {1: 1.0, 2: 3 / 2, 3: 11 / 6, 10: 7381 / 2520}
    assert found is not None
    assert found.item() == pytest.approx(-0.02 / harmonic[epoch] * roots, rel=1e-5)


def test_descent_on_the_penalty_alone_widens_all_noise() -> None:
    model = ready(network(), Learn2Perturb(gamma=1.0))
    before = [p.detach().clone() for p in sigmas(model)]
    optimizer = torch.optim.SGD(sigmas(model), 0.1)
    value = penalty(model, Progress(1, 1))
    assert value is not None
    value.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert all((p > old).all() for p, old in zip(sigmas(model), before, strict=True))


def test_with_gamma_0_the_penalty_is_zero() -> None:
    value = penalty(ready(network(), Learn2Perturb(gamma=0.0)), Progress(1, 1))
    assert value is not None
    assert value.item() == 0


def test_sigmas_get_their_shape_in_the_first_pass_in_any_mode() -> None:
    for train, predict in ((True, False), (False, True)):
        model = network().eval()
        Learn2Perturb(train=train, predict=predict).install(model, 0)
        with torch.no_grad():
            model(images())
        assert [p.shape for p in sigmas(model)] == [(4, 6, 6), (4, 2, 2)]
        assert all(p.requires_grad for p in sigmas(model))


def test_a_copy_made_before_the_first_pass_works() -> None:
    model = network()
    Learn2Perturb().install(model, 0)
    twin = copy.deepcopy(model)
    for part in (model, twin):
        part(images())
    assert torch.equal(model(images()), twin(images()))


def test_only_convolutions_get_noise() -> None:
    layer: NoiseLayer = layer_of(one_convolution(0.1))
    assert layer.active
    assert len(noise_layers(ready(network(), Learn2Perturb()))) == 2
