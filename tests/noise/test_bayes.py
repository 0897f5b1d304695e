"""Gaussian weights: their distribution, and the divergence from the prior in the loss."""

import copy
import io
from typing import Any

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from robusttrain.noise.bayes import Bayes
from robusttrain.noise.layer import Progress, noise_layers, penalty
from robusttrain.noise.pni import PNIWeights
from toys.noise import continued, layer_of, network

MEANS = [f"{place}.parametrizations.weight.original" for place in (0, 3, 5)]
SIGMAS = [f"{place}.parametrizations.weight.0.log_sigma" for place in (0, 3, 5)]


def bayesian(seed: int = 1, **settings: Any) -> nn.Module:
    """A network with random means and sigmas."""
    model = network()
    Bayes(**settings).install(model, 0)
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mean, sigma in zip(MEANS, SIGMAS, strict=True):
            model.get_parameter(mean).normal_(0, 0.2, generator=stream)
            model.get_parameter(sigma).uniform_(-5, 0, generator=stream)
    return model


def divergence(model: nn.Module, prior: float) -> float:
    """The sum of KL(N(mean, sigma^2) || N(0, prior^2)) over all weights, by torch in float64."""
    total = 0.0
    for mean, log_sigma in zip(MEANS, SIGMAS, strict=True):
        mu, sigma = (model.get_parameter(name).detach().double() for name in (mean, log_sigma))
        posterior = Normal(mu, sigma.exp())
        total += float(kl_divergence(posterior, Normal(torch.zeros_like(mu), prior)).sum())
    return total


def value_of(model: nn.Module, images: int = 1) -> Tensor:
    found = penalty(model, Progress(1, images))
    assert found is not None
    return found


def test_each_weight_is_normal_around_its_mean() -> None:
    model = nn.Linear(300, 300)
    mean = model.weight.detach().clone()
    Bayes(initial=0.02).install(model, 3)
    (log_sigma,) = layer_of(model).parameters()
    with torch.no_grad():
        log_sigma.uniform_(-5, 0)
    noise = (model.weight.detach() - mean) / log_sigma.detach().exp()
    assert kstest(noise.flatten().numpy(), "norm").pvalue > 1e-4


def test_weights_and_sigmas_get_the_gradient_of_the_reparametrization() -> None:
    """w = mean + sigma n: dL/dmean = dL/dw and dL/dlog sigma = dL/dw sigma n."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double()
    Bayes(initial=0.3).install(model, 3)
    n = torch.empty(4, 6, dtype=torch.float64).normal_(generator=continued(layer_of(model)))
    x = torch.rand(5, 6, dtype=torch.float64)
    output = model(x)
    output.square().sum().backward()
    slope = 2 * output.detach().T @ x
    (log_sigma,) = layer_of(model).parameters()
    torch.testing.assert_close(model.get_parameter("parametrizations.weight.original").grad, slope)
    torch.testing.assert_close(log_sigma.grad, slope * 0.3 * n)


def test_sigmas_start_at_the_initial_value() -> None:
    model = network()
    Bayes(initial=0.07).install(model, 0)
    for mean, sigma in zip(MEANS, SIGMAS, strict=True):
        log_sigma = model.get_parameter(sigma)
        assert log_sigma.shape == model.get_parameter(mean).shape
        torch.testing.assert_close(log_sigma.exp(), torch.full_like(log_sigma, 0.07))
    assert len(list(model.parameters())) == len(list(network().parameters())) + 3


@pytest.mark.parametrize("prior", [0.02, 0.1, 3.0])
@pytest.mark.parametrize(("kl", "images"), [(1.0, 1), (0.02, 60_000), (0.0, 10)])
def test_the_penalty_is_the_divergence_from_the_prior(prior: float, kl: float, images: int) -> None:
    model = bayesian(prior=prior, kl=kl)
    expected = kl * divergence(model, prior) / images
    assert value_of(model, images).item() == pytest.approx(expected, rel=1e-4)


def test_it_is_zero_where_the_weights_are_those_of_the_prior() -> None:
    model = network()
    Bayes(initial=0.3, prior=0.3, kl=1.0).install(model, 0)
    with torch.no_grad():
        for mean in MEANS:
            model.get_parameter(mean).zero_()
    assert value_of(model).item() == pytest.approx(0, abs=1e-4)


def test_its_gradient_reaches_the_means_of_the_layers() -> None:
    """kl mean / (prior^2 images), and kl (sigma^2 / prior^2 - 1) / images for log sigma."""
    model = bayesian(prior=0.5, kl=3.0)
    value_of(model, 10).backward()  # type: ignore[no-untyped-call]
    for mean, log_sigma in zip(MEANS, SIGMAS, strict=True):
        mu, s = model.get_parameter(mean), model.get_parameter(log_sigma)
        torch.testing.assert_close(mu.grad, 0.3 * mu.detach() / 0.25)
        torch.testing.assert_close(s.grad, 0.3 * ((2 * s.detach()).exp() / 0.25 - 1))


def _copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def _loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = bayesian(seed=2, prior=0.5, kl=1.0)
    again.load_state_dict(torch.load(file, weights_only=True))
    return again


def _assigned(model: nn.Module) -> nn.Module:
    """With the tensors of a file in the place of the parameters."""
    again = bayesian(seed=2, prior=0.5, kl=1.0)
    again.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return again


def _moved(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double().float().to(memory_format=torch.channels_last)


@pytest.mark.parametrize("remade", [_copied, _loaded, _assigned, _moved])
def test_the_penalty_of_a_copy_is_that_of_its_own_weights(remade: Any) -> None:
    model = bayesian(prior=0.5, kl=1.0)
    before = divergence(model, 0.5)
    again = remade(model)
    assert value_of(again).item() == pytest.approx(before, rel=1e-4)
    with torch.no_grad():
        for mean in MEANS:
            again.get_parameter(mean).add_(1)
    assert divergence(again, 0.5) > before + 1
    assert value_of(again).item() == pytest.approx(divergence(again, 0.5), rel=1e-4)
    assert value_of(model).item() == pytest.approx(before, rel=1e-4)
    value_of(again).backward()  # type: ignore[no-untyped-call]
    for mean in MEANS:
        assert model.get_parameter(mean).grad is None
        assert again.get_parameter(mean).grad is not None


@pytest.mark.parametrize("first", [PNIWeights(), Bayes()])
def test_weights_with_other_noise_can_have_this_one_too(first: Any) -> None:
    model = network()
    first.install(model, 0)
    Bayes(prior=0.5, kl=1.0).install(model, 1)
    assert len(noise_layers(model)) == 6
    second = noise_layers(model)[1::2]
    expected = sum(
        kl_divergence(Normal(model.get_parameter(mean).detach(), 0.02), Normal(0.0, 0.5))
        .sum()
        .item()
        for mean in MEANS
    )
    found = [layer.penalty(Progress(1, 1)) for layer in second]
    assert sum(value.item() for value in found if value is not None) == pytest.approx(expected)
