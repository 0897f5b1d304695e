"""Certificates: bounds and radii in closed form, coverage by simulation, attacks inside, kills."""

import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats
from statsmodels.stats.proportion import proportion_confint
from torch import Tensor, nn

from robusttrain.attacks.attack_loss import AttackLoss
from robusttrain.attacks.model_view import predictions
from robusttrain.attacks.pgd import PGD
from robusttrain.data import Split
from robusttrain.errors import InputError
from robusttrain.evaluation import Evaluation, certification
from robusttrain.evaluation.cache import NO_CACHE, Cache, FolderCache, description
from robusttrain.evaluation.certification import (
    GROUPS,
    VOTES,
    Certificates,
    Certified,
    certifiable,
    certify,
    lower_bound,
)
from robusttrain.evaluation.pipeline import EvaluationCache, EvaluationResult, Plan, run_evaluation
from robusttrain.evaluation.session import EvaluationSession
from robusttrain.evaluation.settings import Certification
from robusttrain.evaluation.voting import MajorityVote
from robusttrain.noise import Noise
from robusttrain.noise.additive import AdditiveNoise
from robusttrain.noise.control import noise_off
from robusttrain.noise.exponential import Exponential
from robusttrain.noise.gaussian import Gaussian
from robusttrain.noise.laplace import Laplace
from robusttrain.noise.layer import Vote, noise_layers
from robusttrain.noise.pni import PNIWeights
from robusttrain.noise.smoothing import Distribution, Smoothing
from robusttrain.noise.stack import Stack
from robusttrain.noise.uniform import UniformNoise
from robusttrain.report.terminal import Terminal
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball

SIGMA, PIXELS = 0.25, 16

# Draws that a test need not wait for.
FEW = {"n0": 21, "n": 200, "attack_steps": 2}


# --- toys ---------------------------------------------------------------------------------------


class Halfspace(nn.Module):
    """Class 1 where <normal, x - 1/2> is above 0, with |normal| = 1."""

    def __init__(self, normal: Tensor) -> None:
        super().__init__()
        self.normal = normal / normal.norm()

    def forward(self, x: Tensor) -> Tensor:
        score = ((x.flatten(1) - 0.5) * self.normal).sum(1, keepdim=True)
        return torch.cat([-score, score], 1)

    def at(self, distances: Sequence[float]) -> Tensor:
        """Images so far from the boundary; beyond it where negative."""
        x: Tensor = 0.5 + torch.tensor(distances, dtype=torch.float32)[:, None] * self.normal
        assert 0 <= x.min() <= x.max() <= 1
        return x.view(-1, 1, 4, 4)


def oblique() -> Halfspace:
    return Halfspace(torch.randn(PIXELS, generator=torch.Generator().manual_seed(0)))


def one_pixel() -> Halfspace:
    """Of 16 pixels, so that draws are cut into batches without a rest, the first one decides."""
    return Halfspace(torch.eye(PIXELS)[0])


Toy = Callable[[], Halfspace]

# Each with the classifier that attains its bound, and the distribution of an entry of the noise.
KINDS: list[tuple[type[AdditiveNoise], Toy, Any]] = [
    (Gaussian, oblique, stats.norm(scale=SIGMA)),
    (Laplace, one_pixel, stats.laplace(scale=SIGMA / 2**0.5)),
    (UniformNoise, one_pixel, stats.uniform(-(3**0.5) * SIGMA, 2 * 3**0.5 * SIGMA)),
]
kinds = pytest.mark.parametrize(("kind", "toy", "law"), KINDS)


def smoothed(model: nn.Module, noise: Noise | None = None) -> nn.Module:
    (noise or Smoothing(SIGMA)).install(model, 3)
    return model.eval()


def certified(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    index: Sequence[int] | None = None,
    batch_size: int = 128,
    seed: int = 0,
    votes: int = 50,
    saved: Cache = NO_CACHE,
    **settings: Any,
) -> Certificates:
    """Certificates of images of class 1, in a moment."""
    y = torch.ones(len(x), dtype=torch.int64) if y is None else y
    subject = EvaluationSession(model, x, y, batch_size, 2, votes, seed, saved)
    places = np.arange(len(x)) if index is None else np.array(index)
    return certify(subject, places, Certification(**{**FEW, **settings}))


def timeless(images: Sequence[Certified]) -> list[Certified]:
    return [replace(image, seconds=0.0) for image in images]


def check_of(found: Certificates) -> tuple[float, str]:
    (check,) = found.audit.checks
    assert check.check == "certificates broken by an attack"
    return check.figure, check.verdict.value


# --- the bound ----------------------------------------------------------------------------------


@given(
    n=st.integers(1, 20_000), share=st.floats(0, 1), alpha=st.floats(1e-6, 0.999), end=st.booleans()
)
def test_the_bound_is_that_of_clopper_and_pearson(
    n: int, share: float, alpha: float, end: bool
) -> None:
    k = round(share) * n if end else round(share * n)
    bound = lower_bound(k, n, alpha)
    expected = stats.binomtest(k, n, alternative="greater").proportion_ci(1 - alpha).low
    assert bound == pytest.approx(expected, rel=1e-6, abs=1e-9)
    if k == n:
        assert bound == pytest.approx(alpha ** (1 / n), rel=1e-9)


@given(
    n=st.integers(1, 2000),
    share=st.floats(0, 1),
    alpha=st.one_of(st.floats(1e-4, 0.5), st.floats(-60, -4).map(lambda power: 10**power)),
)
def test_at_the_bound_so_many_hits_have_the_probability_alpha(
    n: int, share: float, alpha: float
) -> None:
    k = max(1, round(share * n))
    assert stats.binom.sf(k - 1, n, lower_bound(k, n, alpha)) == pytest.approx(alpha, rel=1e-5)
    assert lower_bound(n, n, alpha) == pytest.approx(alpha ** (1 / n), rel=1e-9)


@pytest.mark.parametrize(
    ("n", "radius"), [(100, "1.50"), (1000, "2.46"), (10_000, "3.20"), (100_000, "3.81")]
)
def test_the_largest_radii(n: int, radius: str) -> None:
    """Cohen et al. 2019, figure 9, in units of sigma, at alpha .001."""
    bound = lower_bound(n, n, 0.001)
    assert f"{Gaussian(1.0).radius(bound):.2f}" == radius
    assert f"{Gaussian(0.25).radius(bound) / 0.25:.2f}" == radius


@pytest.mark.parametrize(("n", "radius"), [(100, "1.50"), (1000, "2.46")])
def test_where_all_draws_agree_the_radius_is_the_largest_one(n: int, radius: str) -> None:
    far = one_pixel()
    model = smoothed(Shifted(far, 99.0), Gaussian(0.5, predict=True))
    (image,) = certified(model, far.at([0.0]), n=n, alpha=0.001).images
    assert f"{image.radius / 0.5:.2f}" == radius
    assert (image.predicted, image.abstained) == (1, False)


class Shifted(nn.Module):
    """A halfspace from whose boundary all images are so much further away."""

    def __init__(self, model: Halfspace, shift: float) -> None:
        super().__init__()
        self.model, self.shift = model, shift

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits + self.shift * torch.tensor([-1.0, 1.0])


# --- the theorems -------------------------------------------------------------------------------


@kinds
@given(share=st.floats(0, 0.999))
def test_the_radius_of_the_exact_probability_leads_to_the_boundary(
    kind: type[AdditiveNoise], toy: Toy, law: Any, share: float
) -> None:
    """One pixel at a distance d above its threshold is on the right side with probability F(d).

    So is an image at a distance d from a hyperplane under Gaussian noise. Nothing is left at d, so
    that a larger radius would be wrong, and a smaller one would give away something.
    """
    d = share * min(3 * SIGMA, law.support()[1])
    radius = kind(SIGMA).radius(float(law.cdf(d)))
    assert radius == pytest.approx(d, rel=1e-6, abs=1e-9)
    assert law.cdf(d - radius) == pytest.approx(0.5, abs=1e-9)


@kinds
@given(p=st.lists(st.floats(0.5, 1, exclude_max=True), min_size=2, max_size=2))
def test_radii_are_not_negative_and_grow_with_the_probability(
    kind: type[AdditiveNoise], toy: Toy, law: Any, p: list[float]
) -> None:
    low, high = (kind(SIGMA).radius(share) for share in sorted(p))
    assert 0 <= low <= high
    assert kind(SIGMA).radius(0.6) < kind(SIGMA).radius(0.7)


@pytest.mark.parametrize(
    ("distribution", "kind", "norm", "paper"),
    [
        ("gaussian", Gaussian, "l2", "Cohen et al. 2019"),
        ("laplace", Laplace, "l1", "Teng et al. 2020"),
        ("uniform", UniformNoise, "l1", "Yang et al. 2020"),
    ],
)
def test_each_noise_names_its_norm_and_its_theorem(
    distribution: str, kind: type[AdditiveNoise], norm: str, paper: str
) -> None:
    for noise in (kind(SIGMA), Smoothing(SIGMA, Distribution(distribution))):
        found = certified(smoothed(one_pixel(), noise_on(noise)), one_pixel().at([0.3]))
        assert found.theorem.norm == norm
        assert found.theorem.paper.startswith(paper)
        assert {point.row.threat.norm for point in found.audit.curve} == {norm}
        assert {row.threat.norm for row in found.audit.controls} <= {norm}


def noise_on(noise: AdditiveNoise) -> AdditiveNoise:
    return replace(noise, predict=True, vote=Vote.majority)


@kinds
def test_with_many_draws_radii_come_close_to_the_exact_ones_from_below(
    kind: type[AdditiveNoise], toy: Toy, law: Any
) -> None:
    distances, n = [0.1, 0.2, 0.3], 20_000
    model = toy()
    x = model.at(distances)
    noise = kind(SIGMA, predict=True)
    found = certified(smoothed(model, noise), x, n0=1000, n=n, batch_size=2000)
    for d, image in zip(distances, found.images, strict=True):
        p = float(law.cdf(d))
        # The bound lies 3.1 standard errors below a count that is up to 4 of them off itself.
        lowest = kind(SIGMA).radius(p - 7.1 * (p * (1 - p) / n) ** 0.5)
        assert lowest < image.radius < d


# --- coverage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [0.0, 0.08, 0.3])
def test_no_more_than_alpha_of_the_certificates_are_wrong(distance: float) -> None:
    """Nor are there fewer than an exact bound makes, which would give radii away.

    A certificate is wrong where it exceeds the distance to the boundary, or where the class is the
    one beyond it. How often that happens is a sum of binomial probabilities.
    """
    many, n0, n, alpha = 600, 11, 100, 0.05
    model = oblique()
    x = model.at([distance]).expand(many, 1, 4, 4)
    found = certified(smoothed(model), x, n0=n0, n=n, alpha=alpha, attack_steps=1, votes=1).images
    wrong = [
        not image.abstained and (image.predicted != 1 or image.radius > distance) for image in found
    ]

    p = stats.norm.cdf(distance / SIGMA)
    bounds = np.array([stats.beta.ppf(alpha, k, n - k + 1) for k in range(1, n + 1)])
    too_large, half = (1 + np.flatnonzero(bounds > least)[0] for least in (p, 0.5))
    chosen = stats.binom.sf(n0 // 2, n0, p)
    exact = chosen * stats.binom.sf(too_large - 1, n, p)
    exact += (1 - chosen) * stats.binom.sf(half - 1, n, 1 - p)
    assert alpha / 2 < exact <= alpha

    assert sum(wrong) <= stats.binom.ppf(0.9999, many, alpha)
    assert stats.binomtest(sum(wrong), many, exact).pvalue > 1e-3


def test_an_image_on_the_boundary_is_abstained_from() -> None:
    model = oblique()
    for image in certified(smoothed(model), model.at([0.0] * 20), alpha=0.001).images:
        assert (image.abstained, image.radius) == (True, 0.0)


def test_draws_that_choose_the_class_do_not_count_it() -> None:
    seen: list[Tensor] = []
    model = smoothed(oblique())
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    certified(model, oblique().at([0.0]), n0=40, n=160, batch_size=32)
    # One pass shows how many classes there are; nothing is attacked.
    draws = torch.cat(seen).flatten(1)[1:]
    assert len(draws) == len(np.unique(draws.numpy(), axis=0)) == 200


# --- outputs that are no numbers ----------------------------------------------------------------


class Fragile(nn.Module):
    """A halfspace whose logit of class 1 is `value` in draws whose last pixel is above 1/2."""

    def __init__(self, value: float, threshold: float = 0.5) -> None:
        super().__init__()
        self.model, self.value, self.threshold = one_pixel(), value, threshold

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        hit = x.flatten(1)[:, -1] > self.threshold
        logits[:, 1] = torch.where(hit, self.value, logits[:, 1])
        return logits


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_numbers_are_nobodys_vote(value: float) -> None:
    x = one_pixel().at([0.45] * 3)
    (whole, *_) = certified(smoothed(Fragile(value, threshold=99)), x).images
    assert whole.radius > 0.9 * SIGMA
    for image in certified(smoothed(Fragile(value)), x).images:
        assert (image.predicted, image.abstained, image.radius) == (1, True, 0.0)


@pytest.mark.parametrize("label", [0, 1])
def test_a_model_that_never_gives_numbers_is_certified_nowhere(label: int) -> None:
    x = one_pixel().at([0.45] * 3)
    y = torch.full((3,), label)
    found = certified(smoothed(Fragile(torch.nan, threshold=-99)), x, y)
    assert all(image.abstained and not image.holds(0) for image in found.images)
    assert found.audit.curve[0].row.accuracy == 0
    assert found.audit.controls == []


def test_a_majority_of_no_numbers_is_no_prediction() -> None:
    """Not even for the class whose logit is the one that is no number."""
    x = one_pixel().at([0.45] * 3)
    for alpha in (None, 0.001):
        never = MajorityVote(smoothed(Fragile(torch.nan, threshold=-99)), 20, alpha)
        assert predictions(never(x)).tolist() == [-1] * 3
    half = MajorityVote(smoothed(Fragile(torch.nan)), 500)(x)
    assert half[:, 1].tolist() == pytest.approx([0.5] * 3, abs=0.1)


# --- the curve ----------------------------------------------------------------------------------


def test_a_certificate_holds_up_to_its_radius_and_for_the_right_class_only() -> None:
    image = Certified(7, label=2, predicted=2, radius=0.5, abstained=False, seconds=0.0)
    assert image.holds(0)
    assert image.holds(0.5)
    assert not image.holds(0.5001)
    assert not replace(image, predicted=1).holds(0)
    assert not replace(image, radius=0.0, abstained=True).holds(0)


def test_the_curve_counts_the_images_that_are_certified() -> None:
    """Of 12: four at .2, four at .4, two of a wrong label at .4, two on the boundary."""
    model = oblique()
    x = model.at([0.2] * 4 + [0.4] * 6 + [0.0] * 2)
    y = torch.tensor([1] * 8 + [0] * 2 + [1] * 2)
    found = certified(smoothed(model), x, y, n=1000, radii=[0.0, 0.1, 0.3, 0.45, 9.0])
    counts = [8, 8, 4, 0, 0]
    assert [point.row.threat.eps for point in found.audit.curve] == [0.0, 0.1, 0.3, 0.45, 9.0]
    for point, count in zip(found.audit.curve, counts, strict=True):
        row = point.row
        interval = proportion_confint(count, 12, method="wilson")
        assert (point.curve, row.threat.norm, row.n) == ("certified", "l2", 12)
        assert row.accuracy == count / 12
        assert (row.ci_low, row.ci_high) == pytest.approx(interval, abs=1e-9)
        assert point.steps is None
        assert point.eot is None
    assert [image.label for image in found.images] == y.tolist()
    assert {image.predicted for image in found.images[:10]} == {1}


# --- attacks inside of certificates -------------------------------------------------------------

SPREAD = [0.0, 0.12, 0.16, 0.2, 0.24, 0.28, 0.32, 0.36, 0.4, 0.44]


@kinds
def test_no_certificate_of_an_honest_model_is_broken(
    kind: type[AdditiveNoise], toy: Toy, law: Any
) -> None:
    model = toy()
    x = model.at(SPREAD)
    found = certified(smoothed(model, kind(SIGMA, predict=True)), x, n=500, attack_steps=10)
    assert check_of(found) == (0, "pass")
    (row,) = found.audit.controls
    radii = [image.radius for image in found.images if not image.abstained]
    assert found.images[0].abstained
    assert (row.attack, row.n, row.accuracy) == ("in_certificate", len(radii), 1.0)
    assert row.threat.eps == min(radii)


class Liar(Gaussian):
    def radius(self, probability: float) -> float:
        return 3 * super().radius(probability)


class LaplaceLiar(Laplace):
    def radius(self, probability: float) -> float:
        return 3 * super().radius(probability)


class UniformLiar(UniformNoise):
    def radius(self, probability: float) -> float:
        return 3 * super().radius(probability)


@pytest.mark.parametrize(
    ("liar", "toy"), [(Liar, oblique), (LaplaceLiar, one_pixel), (UniformLiar, one_pixel)]
)
def test_a_noise_that_lies_about_its_radii_is_found_out(
    liar: type[AdditiveNoise], toy: Toy
) -> None:
    model = toy()
    x = model.at(SPREAD)
    found = certified(smoothed(model, liar(SIGMA, predict=True)), x, n=500, attack_steps=10)
    figure, verdict = check_of(found)
    (row,) = found.audit.controls
    assert verdict == "fail"
    assert figure >= 5
    assert row.accuracy == pytest.approx(1 - figure / row.n)


def test_certificates_without_the_noise_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    votes = certification._votes

    def noiseless(subject: EvaluationSession, x: Tensor, draws: int) -> Tensor:
        with noise_off(subject.model):
            return votes(subject, x, draws)

    monkeypatch.setattr(certification, "_votes", noiseless)
    model = one_pixel()
    x = model.at([0.1, 0.15, 0.2, 0.25])
    found = certified(smoothed(model), x, n=1000, attack_steps=10)
    assert {f"{image.radius / SIGMA:.2f}" for image in found.images} == {"2.46"}
    assert check_of(found) == (4, "fail")


def test_few_votes_do_not_blind_the_check() -> None:
    """One vote could never say that a certificate is broken: it would abstain from every image."""
    model = oblique()
    x = model.at(SPREAD)
    few: dict[str, Any] = {"n0": 1, "votes": 1, "alpha": 1e-4}
    found = certified(smoothed(model, Liar(SIGMA, predict=True)), x, n=500, attack_steps=10, **few)
    assert check_of(found)[1] == "fail"


def test_an_alpha_that_is_hard_to_convince_does_not_blind_the_check() -> None:
    """100 votes that all agree have p = 2 / 2^100, which is above this alpha."""
    model = oblique()
    x = model.at([0.44] * 4)
    found = certified(
        smoothed(model, Liar(SIGMA, predict=True)), x, n=2000, attack_steps=10, alpha=1e-32
    )
    assert check_of(found)[1] == "fail"


def test_what_alpha_allows_is_a_number_however_large_it_is() -> None:
    model = oblique()
    found = certified(smoothed(model), model.at([0.3] * 5), alpha=0.9)
    (check,) = found.audit.checks
    assert "nan" not in check.threshold


@dataclass
class Recorded(PGD):
    """PGD that keeps what it was asked to search and what it found."""

    def search(self, surrogate: AttackLoss, x: Tensor, generator: torch.Generator) -> Tensor:
        x_adv = super().search(surrogate, x, generator)
        SEARCHES.append((self.norm, self.eps, x, x_adv, surrogate.labels))
        return x_adv


SEARCHES: list[tuple[Norm, float, Tensor, Tensor, Tensor]] = []


@kinds
def test_each_group_is_attacked_inside_of_its_smallest_radius(
    kind: type[AdditiveNoise], toy: Toy, law: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certification, "PGD", Recorded)
    SEARCHES.clear()
    model = toy()
    # On either side of the boundary, all of label 1: what is certified is attacked.
    x = model.at([*SPREAD, -0.3, -0.4])
    found = certified(smoothed(model, kind(SIGMA, predict=True)), x, n=500)
    assert len(SEARCHES) == GROUPS
    attacked = []
    for norm, eps, start, x_adv, labels in SEARCHES:
        places = [int((x == image).flatten(1).all(1).nonzero()) for image in start]
        group = [found.images[place] for place in places]
        smallest = min(image.radius for image in group)
        assert norm == found.theorem.norm
        assert 0.99 * smallest < eps < smallest
        assert ball(Threat(norm, 0)).norm(x_adv - start).max() < smallest
        assert labels.tolist() == [image.predicted for image in group]
        attacked.append(sorted(image.radius for image in group))
    assert sum(map(len, attacked)) == sum(not image.abstained for image in found.images) < len(x)
    # Groups of similar radii.
    assert all(low[-1] <= high[0] for low, high in itertools.pairwise(attacked))
    assert found.images[-1].predicted == 0


def test_where_nothing_is_certified_nothing_is_attacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certification, "PGD", Recorded)
    SEARCHES.clear()
    model = oblique()
    found = certified(smoothed(model), model.at([0.0] * 3))
    assert not SEARCHES
    assert found.audit.controls == []
    assert check_of(found) == (0, "pass")


def test_a_single_certificate_is_attacked() -> None:
    model = oblique()
    found = certified(smoothed(model), model.at([0.4, 0.0]))
    assert found.audit.controls[0].n == 1


def test_the_bar_advances_once_an_image_and_a_group() -> None:
    model = oblique()
    x, steps = model.at([0.4, 0.3, 0.0]), list[int]()
    subject = EvaluationSession(smoothed(model), x, torch.ones(3), 128, 1, 20, 0)
    certify(subject, np.arange(3), Certification(**FEW), steps.append)  # type: ignore[arg-type]
    assert sum(steps) == 3 + GROUPS


# --- independence -------------------------------------------------------------------------------

CLOSE = [0.02 * step for step in range(8)]


def test_certificates_repeat() -> None:
    model = one_pixel()
    x = model.at(CLOSE)
    runs = []
    for start in (1, 2):
        torch.manual_seed(start)
        before = torch.get_rng_state()
        runs.append(certified(smoothed(one_pixel()), x))
        assert torch.equal(torch.get_rng_state(), before)
    first, second = runs
    assert timeless(first.images) == timeless(second.images)
    assert first.audit == second.audit
    assert all(image.seconds > 0 for image in first.images)
    other = certified(smoothed(one_pixel()), x, seed=1)
    assert timeless(other.images) != timeless(first.images)


def test_a_certificate_hangs_on_no_other_image() -> None:
    model = one_pixel()
    x, places = model.at(CLOSE), [10 * step for step in range(8)]
    together = certified(smoothed(model), x, index=places).images
    some = [6, 1, 3]
    apart = certified(smoothed(one_pixel()), x[some], index=[places[step] for step in some]).images
    assert timeless(apart) == timeless([together[step] for step in some])
    assert [image.index for image in together] == places


def test_images_of_another_place_have_other_draws() -> None:
    model = one_pixel()
    images = certified(smoothed(model), model.at([0.15] * 8)).images
    assert len({image.radius for image in images}) > 4


@pytest.mark.parametrize("batch_size", [1, 7, 50, 1000])
def test_a_certificate_does_not_hang_on_the_size_of_batches(batch_size: int) -> None:
    """Where arithmetic is exact, and no image ends in the middle of what is drawn at a time."""
    model, x = one_pixel(), one_pixel().at(CLOSE)
    settings: dict[str, Any] = {"n0": 20, "n": 100}
    expected = certified(smoothed(model), x, **settings).images
    found = certified(smoothed(one_pixel()), x, batch_size=batch_size, **settings).images
    assert timeless(found) == timeless(expected)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batches_hold_no_more_images_than_they_may(batch_size: int) -> None:
    sizes: list[int] = []
    model = smoothed(one_pixel())
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    certified(model, one_pixel().at([0.0]), batch_size=batch_size, n0=20, n=100)
    assert max(sizes) == batch_size
    # One image shows how many classes there are.
    assert sum(sizes) == 1 + 20 + 100


# --- killed -------------------------------------------------------------------------------------


class Passes:
    """How many images went through the network, and when the plug is pulled."""

    def __init__(self, model: nn.Module, killed_at: float = float("inf")) -> None:
        self.count, self.killed_at = 0, killed_at
        model.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.count += len(output)
        if self.count > self.killed_at:
            raise KeyboardInterrupt


EOT, STEPS = 2, 2
EACH = FEW["n0"] + FEW["n"]
# One image shows how many classes there are: noise that is declared is not looked for.
LOOK = 1


def kill_and_continue(killed_at: int, folder: Path) -> int:
    """How many passes a killed run spares the one that goes on and finds what none has changed."""
    x = one_pixel().at(CLOSE)
    whole = Passes(model := smoothed(one_pixel()))
    reference = certified(model, x)
    Passes(model := smoothed(one_pixel()), killed_at)
    with pytest.raises(KeyboardInterrupt):
        certified(model, x, saved=FolderCache(folder, "work"))
    torch.manual_seed(99)
    again = Passes(model := smoothed(one_pixel()))
    continued = certified(model, x, saved=FolderCache(folder, "work"))
    assert timeless(continued.images) == timeless(reference.images)
    assert continued.audit == reference.audit
    return whole.count - again.count


@pytest.mark.parametrize("finished", [0, 2, 7])
def test_killed_at_an_image_it_goes_on_and_repeats_none(finished: int, tmp_path: Path) -> None:
    killed_at = LOOK + finished * EACH + FEW["n0"] + 50
    assert kill_and_continue(killed_at, tmp_path / "pieces") == finished * EACH


@pytest.mark.parametrize("finished", [0, 3])
def test_killed_in_an_attack_it_goes_on_and_repeats_none(finished: int, tmp_path: Path) -> None:
    found = certified(smoothed(one_pixel()), one_pixel().at(CLOSE)).images
    held = [image for image in found if not image.abstained]
    groups = [len(group) for group in np.array_split(np.arange(len(held)), GROUPS)]
    before, now = sum(groups[:finished]), groups[finished]
    assert now
    search = STEPS * EOT
    groups_before = before * (search + VOTES) + finished * LOOK
    killed_at = LOOK + len(CLOSE) * EACH + groups_before + LOOK + 1
    spared = kill_and_continue(killed_at, tmp_path / "pieces")
    # Who has all certificates does not ask how many classes there are.
    assert spared == LOOK + len(CLOSE) * EACH + before * search + finished * LOOK


def test_certificates_of_other_settings_are_other_work() -> None:
    model, x, y = one_pixel(), one_pixel().at(CLOSE), torch.ones(8)
    names = {
        description(model, x, y, Evaluation(certification=certification))
        for certification in (None, Certification(), Certification(n=200), Certification(alpha=0.1))
    }
    assert len(names) == 4
    assert description(model, x, y, Evaluation(certification=Certification())) in names


# --- whole evaluations --------------------------------------------------------------------------


class Timid(nn.Module):
    """Class 1 by a little where the pixel is above 1/2, or else class 0 by far."""

    def forward(self, x: Tensor) -> Tensor:
        score = torch.where(x.flatten(1)[:, :1] > 0.5, 0.1, -50.0)
        # A slope that shows in no decision, for attacks that want one.
        score = score + 1e-3 * (x.flatten(1)[:, :1] - 0.5)
        return torch.cat([-score, score], 1)


SPLIT = Split(torch.full((6, 1, 4, 4), 179, dtype=torch.uint8), torch.ones(6, dtype=torch.int64))


def evaluated(model: nn.Module, folder: Path, settings: Certification | None) -> EvaluationResult:
    evaluation = Evaluation({}, votes=101, eot=2, certification=settings)
    plan, workplace = Plan(evaluation, Threat(Norm.l2, 0.1), seed=0), EvaluationCache(folder, None)
    terminal = Terminal(Console(file=io.StringIO()))
    found = run_evaluation(model, SPLIT, plan, workplace, terminal).found
    assert found is not None
    return found


def test_noise_of_training_alone_is_certified_as_the_smoothed_classifier(tmp_path: Path) -> None:
    """Of the draws 79 % are of class 1, by a mean softmax of .55: only a majority sees them win."""
    model = Timid()
    Gaussian(SIGMA).install(model, 0)
    (layer,) = noise_layers(model.train())
    found = evaluated(model, tmp_path / "a", Certification(n0=21, n=500))
    assert (layer.on_predict, layer.vote, layer.training, model.training) == (
        False, Vote.mean, True, True
    )  # fmt: skip
    assert found.certificates is not None
    assert all(0.1 < image.radius < 0.2 for image in found.certificates.images)
    assert not found.ledger.misclassified.any()

    wrapped = Timid()
    Smoothing(SIGMA).install(wrapped, 5)
    same = evaluated(wrapped, tmp_path / "b", Certification(n0=21, n=500)).certificates
    assert same is not None
    assert timeless(same.images) == timeless(found.certificates.images)


def test_without_certification_the_mean_softmax_decides(tmp_path: Path) -> None:
    model = Timid()
    Gaussian(SIGMA, predict=True).install(model, 0)
    found = evaluated(model, tmp_path / "a", None)
    assert found.certificates is None
    assert found.ledger.misclassified.all()


def test_switches_are_put_back_after_a_kill(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def killed(count: int, n: int, alpha: float) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(certification, "lower_bound", killed)
    model = Timid()
    Gaussian(SIGMA).install(model, 0)
    with pytest.raises(KeyboardInterrupt):
        evaluated(model, tmp_path / "a", Certification(n0=2, n=20))
    (layer,) = noise_layers(model)
    assert (layer.on_predict, layer.vote, model.training) == (False, Vote.mean, True)


# --- what cannot be certified -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n0": 0}, "n0=0 is not allowed"),
        ({"n0": 100, "n": 99}, "n=99 is not allowed: .* 100 or more"),
        ({"alpha": 0.0}, "alpha=0.0 is not allowed: .* between 0 and 1, both excluded"),
        ({"alpha": 1.0}, "alpha=1.0 is not allowed"),
        ({"alpha": float("nan")}, "alpha=nan is not allowed"),
        ({"radii": [0.0, -0.5]}, "radii=-0.5 is not allowed"),
        ({"radii": []}, r"radii=\[\] is not allowed"),
        ({"attack_steps": 0}, "attack_steps=0 is not allowed"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        Certification(**settings)


@pytest.mark.parametrize(("n", "alpha"), [(9, 0.001), (10, 2.0**-10), (1, 0.5), (132, 1e-40)])
def test_draws_that_could_prove_no_radius_are_refused(n: int, alpha: float) -> None:
    message = f"^n={n} is not allowed: it must be {n + 1} or more with alpha={alpha}: "
    with pytest.raises(InputError, match=message):
        Certification(n0=1, n=n, alpha=alpha)
    Certification(n0=1, n=n + 1, alpha=alpha)


@kinds
@given(alpha=st.floats(1e-6, 0.999))
def test_the_smallest_n_that_is_allowed_proves_a_radius_and_one_less_none(
    kind: type[AdditiveNoise], toy: Toy, law: Any, alpha: float
) -> None:
    n = smallest_allowed(alpha)
    assert kind(SIGMA).radius(lower_bound(n, n, alpha)) > 0
    assert n == 1 or lower_bound(n - 1, n - 1, alpha) <= 0.5 + 1e-12


def smallest_allowed(alpha: float) -> int:
    for n in itertools.count(1):
        try:
            Certification(n0=1, n=n, alpha=alpha)
        except InputError:
            continue
        return n
    raise AssertionError


@pytest.mark.parametrize(
    "noise",
    [
        None,
        Gaussian(0.0, predict=True),
        Smoothing(0.0),
        Gaussian(SIGMA, at="model", predict=True),
        Exponential(SIGMA, predict=True),
        PNIWeights(),
        Stack({"a": Gaussian(SIGMA), "b": PNIWeights()}),
        Stack({"a": Gaussian(SIGMA), "b": Gaussian(SIGMA)}),
    ],
)
def test_what_no_theorem_covers_is_refused(noise: Noise | None) -> None:
    model = nn.Sequential()
    model.add_module("model", nn.Linear(2, 2))
    if noise is not None:
        noise.install(model, 0)
    with pytest.raises(InputError, match=r"^certification needs one noise at the input.*sigma"):
        certifiable(model)


def test_a_stack_of_one_is_that_one() -> None:
    model = one_pixel()
    Stack({"a": Laplace(SIGMA)}).install(model, 0)
    assert certifiable(model) == Laplace(SIGMA)
