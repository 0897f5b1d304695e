"""Randomised classifiers: the vote, the gradient of its expectation, and a fair score."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks.attack_loss import cross_entropy
from robusttrain.attacks.pgd import PGD
from robusttrain.data import Split
from robusttrain.evaluation import Evaluation, evaluate
from robusttrain.evaluation.voting import MeanPrediction
from robusttrain.noise.gaussian import Gaussian
from robusttrain.report.ledger import Ledger
from robusttrain.threat import Norm, Threat

SIGMA = 0.1

# Passes that show whether the outputs of the first batch differ, as it is and perturbed.
IS_IT_RANDOM = 4


class Step(nn.Module):
    """Class 1 where the one pixel is above 1/2, in a steep but smooth way."""

    def __init__(self, slope: float = 100.0) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        score = self.slope * (x.flatten(1) - 0.5)
        return torch.cat([-score, score], 1)


def noisy_step() -> nn.Module:
    model = Step().eval()
    Gaussian(SIGMA, predict=True).install(model, 3)
    return model


def ledger_of(
    model: nn.Module, split: Split, attacks: dict[str, Any], *, eps: float, **settings: Any
) -> Ledger:
    return evaluate(
        model, split, Evaluation(attacks, **settings), threat=Threat(Norm.linf, eps), seed=0
    )


def at_distance(distance: float, count: int) -> Split:
    labels = torch.arange(count) % 2
    pixel = 127.5 + 255 * distance * (2 * labels - 1)
    return Split(pixel.round().to(torch.uint8).view(-1, 1, 1, 1), labels)


class Alternating(nn.Module):
    """Gives the logits of a list in turn."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.calls = logits, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.logits[self.calls - 1].expand(len(x), -1)


def test_the_prediction_is_the_mean_of_the_probabilities() -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) * 5
    model = Alternating(logits)
    mean = MeanPrediction(model, 6)(torch.zeros(4, 1))
    assert model.calls == 6
    np.testing.assert_allclose(
        mean.exp().numpy(), np.tile(logits.softmax(1).mean(0), (4, 1)), rtol=1e-5
    )


def test_probabilities_too_small_for_a_float_stay_finite() -> None:
    logits = torch.tensor([[0.0, 300.0], [0.0, 500.0]])
    mean = MeanPrediction(Alternating(logits), 2)(torch.zeros(1, 1))
    assert mean[0, 0].item() == pytest.approx(-300 - math.log(2), rel=1e-6)


def test_the_gradient_is_that_of_the_expectation() -> None:
    """-log E sigmoid(40 (x + noise - 1/2)), its slope by numerical integration."""
    model = Step(20.0).eval()
    Gaussian(SIGMA, predict=True).install(model, 3)
    x = torch.tensor([[[[0.55]]]], requires_grad=True)
    loss = cross_entropy(MeanPrediction(model, 3000)(x), torch.tensor([1])).sum()
    (gradient,) = torch.autograd.grad(loss, x)
    z = np.linspace(-8, 8, 20_001)
    weight = np.exp(-z * z / 2)
    p = 1 / (1 + np.exp(-40 * (0.05 + SIGMA * z)))
    share = (weight * p).sum() / weight.sum()
    slope = (weight * 40 * p * (1 - p)).sum() / weight.sum()
    assert loss.item() == pytest.approx(-np.log(share), abs=0.02)
    assert gradient.item() == pytest.approx(-slope / share, rel=0.08)


@pytest.mark.parametrize("eps", [0.0, 1e-9])
def test_noise_alone_breaks_nothing(eps: float) -> None:
    """One pass in ten is wrong here; an attack of no size must not profit from that."""
    split = at_distance(0.128, 200)
    attacks = {"pgd": PGD(eps=eps, steps=10), "strong": PGD(eps=eps, steps=10, restarts=3)}
    report = ledger_of(noisy_step(), split, attacks, eps=eps, eot=2, votes=50).report(
        Threat(Norm.linf, 0)
    )
    clean = report.iloc[0]
    assert (report["accuracy"] >= clean["ci_low"]).all()
    assert (report["accuracy"] <= clean["ci_high"]).all()


def test_several_attacks_without_size_have_no_more_luck_than_none() -> None:
    """Near the boundary a second vote would often differ; the same draws give the same class."""
    split = at_distance(0.01, 200)
    attacks = {name: PGD(eps=0.0, steps=2) for name in "abcd"}
    ledger = ledger_of(noisy_step(), split, attacks, eps=0.0, eot=1, votes=5, batch_size=32)
    assert 0 < ledger.misclassified.sum() < 200
    assert (ledger.union == ledger.misclassified).all()


def test_the_score_comes_from_draws_that_no_attack_has_seen() -> None:
    """An attack that looks for draws instead of directions gains nothing by it."""
    split = at_distance(0.128, 400)

    class Lucky:
        """Takes, of ten tries, whatever fooled the model: only the noise differs between them."""

        fooled: Tensor

        def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Tensor:
            tries = [model(x).argmax(1) != y for _ in range(10)]
            self.fooled = torch.stack(tries).any(0)
            return x

    lucky = Lucky()
    ledger = ledger_of(noisy_step(), split, {"lucky": lucky}, eps=0.0, eot=1, votes=50)
    assert lucky.fooled.float().mean() > 0.5
    assert ledger.outcomes["lucky"].broken.mean() < 0.02


def test_attack_and_score_use_as_many_draws_as_asked_for() -> None:
    passes: list[int] = []
    model = noisy_step()
    model.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    # Half a pixel of the unit away from the threshold: never wrong by itself.
    ledger_of(model, at_distance(0.5, 6), {"pgd": PGD(eps=0.1, steps=3)}, eps=0.1, eot=4, votes=5)
    # That noise is declared is known without a look; one image shows how many classes there are,
    # and all of them whether there is a softmax.
    assert passes == [1] + [6] * (1 + 5 + 3 * 4 + 5)


@pytest.mark.parametrize(("sigma", "steps"), [(SIGMA, 7 * 4), (0.0, 2)])
def test_an_attack_on_a_random_model_never_stops_early(sigma: float, steps: int) -> None:
    """The first step is as wide as the ball and breaks every image, as the second one sees."""
    model = Step().eval()
    if sigma:
        Gaussian(sigma, predict=True).install(model, 3)
    attack = PGD(eps=0.5, steps=7, step_size=0.5, random_start=False, stop_early=True)
    crafting: list[bool] = []
    model.register_forward_hook(
        lambda module, inputs, output: crafting.append(inputs[0].requires_grad)
    )
    ledger = ledger_of(model, at_distance(0.2, 6), {"pgd": attack}, eps=0.5, eot=4, votes=5)
    assert ledger.union.all()
    assert sum(crafting) == steps


def test_a_model_without_noise_at_prediction_is_asked_once() -> None:
    model = Step().eval()
    Gaussian(SIGMA, predict=False).install(model, 0)
    passes: list[int] = []
    model.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    ledger_of(model, at_distance(0.4, 6), {"pgd": PGD(eps=0.1, steps=3)}, eps=0.1)
    # A look at the images, one for a softmax, three steps, and a look at their ends.
    assert passes == [6] * (IS_IT_RANDOM + 1 + 1 + 3 + 1)
