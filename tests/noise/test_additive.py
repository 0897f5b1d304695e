"""Additive noise: its distributions, the independence of its draws, and its gradients."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from robusttrain.noise.additive import AdditiveNoise
from robusttrain.noise.exponential import Exponential
from robusttrain.noise.gaussian import Gaussian
from robusttrain.noise.laplace import Laplace
from robusttrain.noise.uniform import UniformNoise
from robusttrain.noise.weibull import Weibull

# Each noise with the distribution of its paper, in SciPy.
NOISES: dict[type[AdditiveNoise], Callable[[float], object]] = {
    Gaussian: lambda sigma: stats.norm(0, sigma),
    Laplace: lambda sigma: stats.laplace(0, sigma / math.sqrt(2)),
    UniformNoise: lambda sigma: stats.uniform(-math.sqrt(3) * sigma, 2 * math.sqrt(3) * sigma),
    Exponential: lambda sigma: stats.expon(0, sigma),
    Weibull: lambda sigma: stats.dweibull(3, 0, sigma / math.sqrt(math.gamma(5 / 3))),
}

every = pytest.mark.parametrize("noise", list(NOISES))


def identity(noise: AdditiveNoise) -> nn.Module:
    model = nn.Sequential(nn.Identity())
    noise.install(model, 7)
    return model


def drawn(noise: AdditiveNoise, value: float = 0.0) -> np.ndarray:
    """The noise that is added to 100,000 pixels of this value."""
    x = torch.full((10, 1, 100, 100), value, dtype=torch.float64)
    return (identity(noise)(x) - value).flatten().numpy()


@every
@pytest.mark.parametrize("sigma", [0.05, 2.0])
def test_the_noise_has_its_distribution_and_is_never_clipped(
    noise: type[AdditiveNoise], sigma: float
) -> None:
    expected = NOISES[noise](sigma)
    assert expected.std() == pytest.approx(sigma)  # type: ignore[attr-defined]
    for value in (0.0, 1.0):
        sample = drawn(noise(sigma), value)
        assert stats.kstest(sample, expected.cdf).pvalue > 1e-4  # type: ignore[attr-defined]
        # The test above is insensitive to the tails, which dominate the deviation.
        assert sample.std() == pytest.approx(sigma, rel=0.02)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_every_precision_the_noise_has_its_tails(
    noise: type[AdditiveNoise], dtype: torch.dtype
) -> None:
    """Of 400,000 draws 400 lie beyond the quantile of 99.9 %, and 20 beyond that of 99.995 %."""
    x = torch.zeros(40, 1, 100, 100, dtype=dtype)
    sample = identity(noise(1.0))(x)
    assert sample.dtype == dtype
    sample = sample.double().flatten().numpy()
    assert sample.std() == pytest.approx(1, rel=0.01)
    for tail, enough in ((1e-3, (320, 480)), (5e-5, (5, 45))):
        beyond = (sample > NOISES[noise](1.0).isf(tail)).sum()  # type: ignore[attr-defined]
        # Rounding to bf16 removes the ends of uniform noise.
        if noise is not UniformNoise:
            assert enough[0] < beyond < enough[1]


@pytest.mark.parametrize("shape", [0.7, 1.0, 2.0, 8.0])
def test_weibull_noise_has_the_deviation_sigma_for_every_shape(shape: float) -> None:
    scale = 0.3 / math.sqrt(stats.weibull_min(shape).moment(2))
    sample = drawn(Weibull(0.3, shape))
    assert stats.kstest(sample, stats.dweibull(shape, 0, scale).cdf).pvalue > 1e-4


def test_weibull_noise_of_shape_1_is_laplace_noise() -> None:
    assert stats.ks_2samp(drawn(Weibull(0.3, 1.0)), drawn(Laplace(0.3))).pvalue > 1e-4


@every
def test_sigma_zero_changes_nothing(noise: type[AdditiveNoise]) -> None:
    assert not drawn(noise(0.0), 0.5).any()


@every
def test_pixels_images_and_passes_get_independent_draws(noise: type[AdditiveNoise]) -> None:
    model, x = identity(noise(1.0)), torch.zeros(2, 1, 50, 50)
    passes = torch.cat([model(x) for _ in range(2)]).flatten(1)
    neighbours = torch.cat([passes, passes.roll(1, 1)])
    correlation = torch.corrcoef(neighbours) - torch.eye(8)
    assert correlation.abs().max() < 0.1


@every
def test_the_noise_is_a_constant_of_the_gradient(noise: type[AdditiveNoise]) -> None:
    x = torch.rand(3, 1, 4, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(identity(noise(1.0))(x).sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


@every
def test_images_are_not_changed_in_place(noise: type[AdditiveNoise]) -> None:
    x = torch.rand(3, 1, 4, 4)
    before: Tensor = x.clone()
    identity(noise(1.0))(x)
    assert torch.equal(x, before)


def test_additive_noise_is_off_in_prediction_by_default() -> None:
    """Its common use is augmentation."""
    for noise in NOISES:
        assert (noise(0.1).train, noise(0.1).predict) == (True, False)
