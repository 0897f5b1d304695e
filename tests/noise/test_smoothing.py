"""Smoothed classifiers: the noise, the vote, and abstention (PREDICT)."""

from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.special import ndtr
from scipy.stats import binomtest
from torch import Tensor, nn

from robusttrain.attacks.model_view import predictions
from robusttrain.checkpoints import external
from robusttrain.data import Split
from robusttrain.evaluation import Evaluation, evaluate
from robusttrain.evaluation.voting import (
    MajorityVote,
    MeanPrediction,
    least_votes,
    prediction,
)
from robusttrain.noise import Noise
from robusttrain.noise.control import drawing_from, noise_off
from robusttrain.noise.gaussian import Gaussian
from robusttrain.noise.laplace import Laplace
from robusttrain.noise.layer import predicts_randomly
from robusttrain.noise.pni import PNIWeights
from robusttrain.noise.rse import RSE
from robusttrain.noise.smoothing import Distribution, Smoothing
from robusttrain.noise.uniform import UniformNoise
from robusttrain.threat import Norm, Threat
from toys.noise import images, layer_of, network, ready, seeded


class Ballots(nn.Module):
    """A model with given votes: `votes` (passes, N) has the class of each image in each pass."""

    def __init__(self, votes: Tensor, classes: int = 3) -> None:
        super().__init__()
        self.votes, self.classes, self.passes = votes, classes, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        # In every other pass one logit is far ahead, which would change a mean but not a vote.
        return nn.functional.one_hot(self.votes[self.passes - 1], self.classes) * (
            0.1 if self.passes % 2 else 50.0
        )


def ballots(*counts: list[int]) -> Ballots:
    """Votes with the given counts for each class, in a random order."""
    columns = []
    for number, image in enumerate(counts):
        votes = torch.repeat_interleave(torch.arange(len(image)), torch.tensor(image))
        columns.append(votes[torch.randperm(len(votes), generator=seeded(number))])
    return Ballots(torch.stack(columns, 1), len(counts[0]))


def two_sided(first: int, second: int) -> float:
    """The probability that a fair coin gives a result at least as uneven as `first` to `second`."""
    throws = first + second
    tail = sum(comb(throws, k) for k in range(max(first, second), throws + 1))
    return min(1.0, 2 * tail / 2**throws)


# The noise


@pytest.mark.parametrize(
    ("distribution", "noise"),
    [("gaussian", Gaussian), ("laplace", Laplace), ("uniform", UniformNoise)],
)
def test_the_noise_is_that_of_the_distribution_at_the_input(distribution: str, noise: Any) -> None:
    model, other, x = network().eval(), network().eval(), images()
    Smoothing(0.3, Distribution(distribution)).install(model, 7)
    noise(0.3, predict=True).install(other, 7)
    for _ in range(2):
        assert torch.equal(model(x), other(x))


def test_it_is_put_around_a_trained_model_and_leaves_training_alone() -> None:
    model = network()
    Smoothing().install(model, 7)
    plain, x = network(), images()
    assert torch.equal(model.train()(x), plain.train()(x))
    assert not torch.equal(model.eval()(x), plain.eval()(x))


def test_a_program_can_be_smoothed(tmp_path: Path) -> None:
    """A program has one mode only, but the noise around it has two."""
    program = torch.export.export(
        network().eval(), (images(4),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    torch.export.save(program, tmp_path / "theirs.pt2")
    given = external.load(tmp_path / "theirs.pt2", ["code"])
    model = ready(given, Smoothing(0.3)).eval()  # type: ignore[arg-type]
    assert predicts_randomly(model)
    assert not torch.equal(*(model(images()) for _ in range(2)))
    with noise_off(model):
        torch.testing.assert_close(model(images()), network().eval()(images()))


# The vote


@pytest.mark.parametrize("alpha", [None, 0.05])
def test_shares_are_those_of_the_votes(alpha: float | None) -> None:
    model = ballots([40, 8, 2], [0, 50, 0], [5, 5, 40])
    shares = MajorityVote(model, 50, alpha)(torch.zeros(3, 1))
    assert model.passes == 50
    expected = torch.tensor([[0.8, 0.16, 0.04], [0, 1, 0], [0.1, 0.1, 0.8]])
    torch.testing.assert_close(shares, expected)


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3])
def test_votes_that_could_be_a_tie_abstain(alpha: float) -> None:
    """For every outcome of the two leading classes, and some votes for a third one."""
    counts = [[first, 35 - first, 5] for first in range(5, 31)]
    shares = MajorityVote(ballots(*counts), 40, alpha)(torch.zeros(len(counts), 1))
    predicted = predictions(shares).tolist()
    for (first, second, _), guess in zip(counts, predicted, strict=True):
        chance = two_sided(first, second)
        assert chance == pytest.approx(binomtest(first, first + second).pvalue)
        assert guess == (-1 if chance > alpha else int(second > first))
    assert -1 in predicted
    assert predicted[0] == 1
    assert predicted[-1] == 0


def test_the_third_class_has_no_part_in_the_test() -> None:
    """Six to zero votes are significant at 5 %, six to four are not."""
    model = ballots([6, 0, 0, 4], [6, 4, 0, 0], [10, 0, 0, 0])
    predicted = predictions(MajorityVote(model, 10, 0.05)(torch.zeros(3, 1)))
    assert predicted.tolist() == [-1, -1, 0]
    sure = ballots([20, 5, 5, 5], [20, 15, 0, 0])
    predicted = predictions(MajorityVote(sure, 35, 0.05)(torch.zeros(2, 1)))
    assert predicted.tolist() == [0, -1]


def test_without_alpha_there_is_always_a_prediction() -> None:
    predicted = predictions(MajorityVote(ballots([3, 2, 0], [0, 2, 3]), 5)(torch.zeros(2, 1)))
    assert predicted.tolist() == [0, 2]


@pytest.mark.parametrize("alpha", [0.5, 0.3, 0.05, 0.001, 1e-6])
def test_the_least_number_of_votes_for_a_prediction(alpha: float) -> None:
    model = network().eval()
    assert least_votes(model) == 1
    Smoothing(alpha=alpha).install(model, 0)
    needed = least_votes(model)
    for votes, predicted in ((needed, 0), (needed - 1, -1)):
        shares = MajorityVote(ballots([votes, 0, 0]), votes, alpha)(torch.zeros(1, 1))
        assert predictions(shares).tolist() == [predicted]


@pytest.mark.parametrize("alpha", [None, 0.05])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_outputs_are_votes_for_no_class(alpha: float | None, bad: float) -> None:
    """As with a single such pass there is no prediction, whichever class has the bad logit."""

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = torch.zeros(len(x), 3)
            logits[:, 1] = bad
            return logits

    predicted = predictions(MajorityVote(Broken(), 50, alpha)(torch.zeros(2, 1)))
    assert predicted.tolist() == [-1, -1]


# Which rule


@pytest.mark.parametrize(
    ("noises", "rule", "alpha"),
    [
        ([Gaussian(predict=True)], MeanPrediction, None),
        ([RSE()], MeanPrediction, None),
        ([RSE(vote="majority")], MajorityVote, None),  # type: ignore[arg-type]
        ([Smoothing(alpha=0.01)], MajorityVote, 0.01),
        ([Smoothing(vote="mean")], MeanPrediction, None),  # type: ignore[arg-type]
        ([PNIWeights(), Smoothing(alpha=0.01)], MajorityVote, 0.01),
        ([Smoothing(alpha=0.01), Smoothing(alpha=0.2)], MajorityVote, 0.01),
        # Noise that is off in prediction does not count.
        ([Smoothing(predict=False), PNIWeights()], MeanPrediction, None),
        ([Gaussian(vote="majority"), PNIWeights()], MeanPrediction, None),  # type: ignore[arg-type]
        ([], MeanPrediction, None),
    ],
)
def test_the_noise_declares_the_rule(
    noises: list[Noise], rule: type[nn.Module], alpha: float | None
) -> None:
    model = network().eval()
    for seed, noise in enumerate(noises):
        noise.install(model, seed)
    chosen = prediction(model, 30)
    assert type(chosen) is rule
    assert chosen.draws == 30
    assert getattr(chosen, "alpha", None) == alpha


# A classifier that is known in closed form

SIGMA = 0.25


class Threshold(nn.Module):
    """Class 1 where the one pixel is above 1/2: smoothed, with probability Phi(t / sigma)."""

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) - 0.5
        return torch.cat([-score, score], 1)


def smoothed(alpha: float = 0.001) -> nn.Module:
    model = Threshold().eval()
    Smoothing(SIGMA, alpha=alpha).install(model, 3)
    return model


def test_shares_are_the_probabilities_of_the_smoothed_classifier() -> None:
    distances = torch.linspace(-0.6, 0.6, 13)
    x = (0.5 + distances).view(-1, 1, 1, 1).repeat_interleave(20, 0)
    shares = MajorityVote(smoothed(), 500)(x)[:, 1].view(13, 20).mean(1)
    expected = ndtr(distances.double().numpy() / SIGMA)
    # 10,000 draws each: a standard error of 0.005 at most.
    assert abs(shares.numpy() - expected).max() < 0.02


@pytest.mark.parametrize("alpha", [0.01, 0.2])
def test_on_the_boundary_predictions_are_as_rare_as_alpha_says(alpha: float) -> None:
    x = torch.full((1000, 1, 1, 1), 0.5)
    predicted = predictions(MajorityVote(smoothed(), 101, alpha)(x))
    made = int((predicted >= 0).sum())
    # Since votes are discrete, the test is slightly stricter than alpha.
    assert made <= alpha * 1000 + 4 * (alpha * (1 - alpha) * 1000) ** 0.5
    assert made > alpha * 1000 / 4
    assert {-1, 0, 1} == set(predicted.tolist())


def test_an_image_without_prediction_counts_as_wrong() -> None:
    pixel = torch.tensor([0, 128, 128, 255], dtype=torch.uint8).view(4, 1, 1, 1)
    split = Split(pixel, torch.tensor([0, 0, 1, 1]))
    ledger = evaluate(
        smoothed(), split, Evaluation({}, votes=100), threat=Threat(Norm.l2, 0.1), seed=0
    )
    assert ledger.prediction.tolist() == [0, -1, -1, 1]
    assert ledger.misclassified.tolist() == [False, True, True, False]


def test_the_same_stream_gives_the_same_votes() -> None:
    model, x = smoothed(), torch.full((20, 1, 1, 1), 0.55)
    assert layer_of(model).alpha == 0.001
    shares = []
    for seed in (1, 1, 2):
        with drawing_from(model, seed):
            shares.append(MajorityVote(model, 30)(x))
    assert torch.equal(shares[0], shares[1])
    assert not torch.equal(shares[0], shares[2])
