"""Noise in models that torch compiles: the same draws, switches and gradients as without."""

import copy
import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from robusttrain.attacks.pgd import PGD
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.noise import Noise
from robusttrain.noise.control import drawing_from, noise_held, noise_off
from robusttrain.noise.gaussian import Gaussian
from robusttrain.noise.none import NoNoise
from toys.noise import MECHANISMS, images, network, noisy, ready, trainer, weights_of

# This backend traces as the real one does, but compiles nothing.
BACKEND = "aot_eager"

# One additive noise represents all of them, which differ only in how they fill a tensor.
DIFFERENT = [
    name
    for name in MECHANISMS
    if name not in ("laplace", "uniform", "exponential", "weibull", "smoothing")
]


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """Discard what another test has compiled."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def answers(model: nn.Module) -> Tensor:
    """Logits and input gradients in both modes, with the noise on, held, off and reseeded."""
    found = []
    for training in (False, True):
        model.train(training)
        x = images().requires_grad_()
        for _ in range(2):
            logits = model(x)
            (gradient,) = torch.autograd.grad(logits.square().sum(), x)
            found += [logits, gradient.flatten(1)]
        model.eval()
        for looking in (noise_held(model, 3), noise_off(model), drawing_from(model, 5)):
            with looking, torch.no_grad():
                found.append(model(x))
    return torch.cat([part.detach().flatten() for part in found])


@pytest.mark.parametrize("mechanism", DIFFERENT)
def test_a_compiled_model_gives_the_same_as_an_uncompiled_one(mechanism: str) -> None:
    compiled: Any = torch.compile(noisy(mechanism), backend=BACKEND)
    torch.testing.assert_close(answers(compiled), answers(noisy(mechanism)))


class Attentive(nn.Module):
    """A network that reads a weight twice in a pass, and has normalised weights."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = weight_norm(nn.Linear(36, 3))

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.mix(x[:, 0], x[:, 0], x[:, 0])[0]
        logits: Tensor = self.head(mixed.flatten(1))
        return logits


@pytest.mark.parametrize("mechanism", ["pni_w", "bayes"])
def test_noise_on_weights_of_any_kind_is_the_same_compiled(mechanism: str) -> None:
    torch.manual_seed(0)
    model = ready(Attentive(), MECHANISMS[mechanism]())
    twin = copy.deepcopy(model)
    compiled: Any = torch.compile(model, backend=BACKEND)
    torch.testing.assert_close(answers(compiled), answers(twin))


@pytest.mark.parametrize("noise", [Gaussian(0.3, at="first"), Gaussian(0.3, draws=2)])
def test_compiled_training_equals_uncompiled_training(
    noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    _compile_by_tracing(monkeypatch)
    weights = [_trained(noise, compiled) for compiled in (True, False)]
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("before", [NoNoise(), Gaussian(0.3)])
def test_a_model_does_not_run_code_that_was_compiled_for_another_noise(
    before: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The jobs of a sweep over `noise` or `noise.at` train one after the other in one process."""
    _compile_by_tracing(monkeypatch)
    _trained(before, compiled=True)
    noise = Gaussian(0.3, at="first")
    torch.testing.assert_close(_trained(noise, compiled=True), _trained(noise, compiled=False))


def _compile_by_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=BACKEND))


def _trained(noise: Noise, compiled: bool) -> Tensor:
    model = ready(network(), noise)
    list(trainer(model, WorstCase(PGD(eps=0.1, steps=2)), compile=compiled).epochs())
    return weights_of(model)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_default_backend_draws_the_same_noise() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(1), nn.Linear(36, 3))
        return ready(model, MECHANISMS["stack"]()).eval()

    compiled, plain, x = torch.compile(build()), build(), images()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), plain(x))
