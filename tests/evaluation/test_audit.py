"""The audit: masked models fail it, honest ones pass, and each check grades what it measures."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from robusttrain.attacks import Attack
from robusttrain.attacks.apgd import APGD
from robusttrain.attacks.attack_loss import AttackLoss
from robusttrain.attacks.ball_attack import BallAttack
from robusttrain.attacks.decision_based import DecisionBased
from robusttrain.attacks.none import NoAttack
from robusttrain.attacks.pgd import PGD
from robusttrain.attacks.square import Square
from robusttrain.data import Split, hold_out
from robusttrain.data.digits import Digits
from robusttrain.defenses import Defense
from robusttrain.defenses.standard import Standard
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.evaluation import Evaluation
from robusttrain.evaluation.attack_suite import PassingOver, attack_all, open_session
from robusttrain.evaluation.audit import (
    MISLEADING_GRADIENTS,
    PIECES,
    _largest_rise,
    _Measured,
    _non_finite,
    _outputs,
    audit,
)
from robusttrain.evaluation.curves import Probe
from robusttrain.evaluation.findings import Audit, Check, Verdict, graded
from robusttrain.evaluation.gradient_checks import gradient_shares
from robusttrain.models.mlp import MLP
from robusttrain.noise.gaussian import Gaussian
from robusttrain.optim.optimizers import Adam
from robusttrain.optim.schedules import OneCycle
from robusttrain.report.ledger import Ledger, Outcome, Point, Row
from robusttrain.report.terminal import Terminal
from robusttrain.runtime.progress import Advance, unreported
from robusttrain.threat import Norm, Threat
from robusttrain.training.recipe import Recipe, TrainingData
from robusttrain.training.settings import Training
from robusttrain.training.trainer import Trainer

EPS = 0.1
PROBE = PGD(eps=EPS, steps=20, stop_early=True)

CONTROL = "suite at eps 0 differs from clean by"
EPS_RISE = "accuracy rises with eps by"
STEPS_RISE = "accuracy rises with steps by"
DOUBLING = "the last doubling of steps gains"
RESTARTS = "accuracy rises with restarts by"
ONE_STEP = "one step beats many by"
NOISE = "random noise beats gradients by"
UNBOUNDED = "linf 0.5 leaves an accuracy of"
OVERRATED = "suite breaks more than the probe by"
OVERLOOKED = "probe breaks more than the suite by"
BLACK_BOX = "black box beats gradients by"
SMALLER = "a smaller ball is weaker by"
ZERO = "gradients that are zero: %"
NO_NUMBERS = "non-finite gradients, %"
PROBABILITIES = "outputs that are probabilities: %"
MISLEADING = MISLEADING_GRADIENTS
UNDECLARED = "undeclared draws change outputs by %"
BATCHNORM = "BatchNorm modes differ by"
INVALID = "invalid adversarial images"


def trained(defense: Defense, epochs: int) -> nn.Module:
    data = Digits()
    train, _ = data.load()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MLP([64]).build(10, (1, 8, 8))
    recipe = Recipe(defense, Adam(5e-3), OneCycle(), Training(epochs=epochs, batch_size=64))
    trainer = Trainer(
        model, recipe, TrainingData(train, hold_out(train, 0, 0)[1], data),
        Threat(Norm.linf, EPS), seed=0, terminal=Terminal(Console(file=io.StringIO())),
    )  # fmt: skip
    list(trainer.epochs())
    return model.eval()


@pytest.fixture(scope="module")
def standard() -> nn.Module:
    return trained(Standard(), 6)


@pytest.fixture(scope="module")
def digits() -> Split:
    return Digits().load()[1]


@pytest.fixture
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches without gradients ask less than usual; with more queries they find no less."""
    short = partial(DecisionBased, queries=300, restarts=1)
    monkeypatch.setattr("robusttrain.evaluation.audit.DecisionBased", short)
    monkeypatch.setattr("robusttrain.evaluation.audit.SQUARE_QUERIES", 200)


def examined(
    model: nn.Module, data: Split, attacks: Mapping[str, Attack] | None = None, **settings: Any
) -> tuple[Probe, dict[str, Attack], Ledger]:
    """The probe, the suite and the ledger of an evaluation: what an audit looks at."""
    chosen = Evaluation({"apgd_ce": APGD(eps=EPS)} if attacks is None else attacks, **settings)
    index, subject = open_session(model, data, chosen, 0)
    suite = chosen.suite(subject.num_classes, subject.random)
    how = PassingOver.of(chosen)
    ledger = attack_all(subject, index, suite, how, threat=Threat(Norm.linf, EPS))
    return Probe(subject, PROBE), suite, ledger


def verdicts(checks: Sequence[Check]) -> dict[str, Verdict]:
    return {check.check: check.verdict for check in checks}


# --- whole models -------------------------------------------------------------------------------


class Masked(nn.Module):
    """A trained model behind something that hides its gradients."""

    def __init__(self, model: nn.Module, mask: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.mask = model, mask

    def forward(self, x: Tensor) -> Tensor:
        return self.mask(self.model, x)


MASKS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "quantised input": lambda model, x: model((x * 8).round() / 8),
    "saturated temperature": lambda model, x: model(x) * 2000,
    "softmax outputs": lambda model, x: (model(x) * 200).softmax(1),
    "shattered gradient": lambda model, x: model(x + 0.03 * torch.sin(400 * x)),
}
# What gives each of them away, for a reason that one can name.
BETRAYED = {
    "quantised input": {ZERO, UNBOUNDED, BLACK_BOX},
    "saturated temperature": {ZERO},
    "softmax outputs": {ZERO},
    "shattered gradient": {BLACK_BOX},
}


@pytest.mark.usefixtures("few_queries")
@pytest.mark.parametrize("name", MASKS)
def test_a_masked_model_fails(name: str, standard: nn.Module, digits: Split) -> None:
    """They keep most of their accuracy under attack, and are no more robust than without."""
    closer = audit(*examined(Masked(standard, MASKS[name]).eval(), digits, samples=100))
    failed = {check for check, verdict in verdicts(closer.checks).items() if verdict == "fail"}
    assert failed >= BETRAYED[name]


class Decoyed(nn.Module):
    """Shows the logits of one network, or their gradient, and predicts the class of another."""

    def __init__(self, model: nn.Module, shown: nn.Module, *, logits: bool) -> None:
        super().__init__()
        self.model, self.shown, self.logits = model, shown, logits

    def forward(self, x: Tensor) -> Tensor:
        shown, decided = self.shown(x), nn.functional.one_hot(self.model(x).argmax(1), 10)
        if self.logits:
            return shown + 100 * decided
        return 5 * decided + shown - shown.detach()


class WeakInside(nn.Module):
    """Is one network up to 0.9 radii from an image, and another one farther away."""

    def __init__(self, inner: nn.Module, outer: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.inner, self.outer, self.images = inner, outer, images.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        distance = torch.cdist(x.flatten(1), self.images, p=torch.inf).amin(1)
        return torch.where((distance < 0.9 * EPS)[:, None], self.inner(x), self.outer(x))


@pytest.fixture(scope="module")
def robust() -> nn.Module:
    return trained(WorstCase(PGD(eps=EPS, steps=5)), 8)


@pytest.fixture(scope="module")
def truth(standard: nn.Module, digits: Split) -> float:
    """What is left of the accuracy of the bare network, which an attacker climbs who knows it."""
    _, _, ledger = examined(standard, digits, samples=100)
    return float(100 * (~ledger.worst_case(PROBE.threat)).mean())


@pytest.mark.parametrize("logits", [True, False], ids=["logits", "gradient"])
def test_labels_show_what_decoys_hide(
    logits: bool, standard: nn.Module, robust: nn.Module, truth: float, digits: Split
) -> None:
    hidden = Decoyed(standard, robust, logits=logits).eval()
    probe, suite, ledger = examined(hidden, digits, samples=100)
    by_suite = 100 * (~ledger.worst_case(PROBE.threat)).mean()
    checks = verdicts(audit(probe, suite, ledger).checks)
    assert by_suite > truth + 10
    assert checks[BLACK_BOX] == "fail"
    assert 100 * (~probe.found).mean() < truth + 5


@pytest.mark.usefixtures("few_queries")
def test_a_model_that_is_weak_inside_of_the_ball_only_fails(
    standard: nn.Module, robust: nn.Module, digits: Split
) -> None:
    model = WeakInside(standard, robust, digits.loaded()[0].float() / 255).eval()
    checks = verdicts(audit(*examined(model, digits, samples=100)).checks)
    assert checks[SMALLER] == "fail"


def measured(
    probe: Any, attacked: Any, suite: Mapping[str, Attack] | None = None, ledger: Any = None
) -> _Measured:
    return _Measured(probe, attacked, suite or {}, ledger, unreported)


@pytest.mark.parametrize(("images", "limit"), [(50, 6), (100, 5), (200, 5), (1000, 5)])
def test_a_few_images_are_no_sign_of_anything(images: int, limit: float) -> None:
    """Searches from other starts differ by an image or two: three of them pass."""
    look = measured(None, np.zeros(images, dtype=np.bool_))
    assert look.weak("rises", limit).verdict == "pass"
    assert look.weak("rises", limit + 0.01).verdict == "warn"


def test_a_weak_search_is_no_hidden_gradient() -> None:
    """What others find counts in the worst case, so that the figure stands."""
    assert measured(None, np.zeros(200, bool)).weak("rises", 100).verdict == "warn"


@pytest.mark.parametrize("defense", ["standard", "pgd"])
def test_an_honest_model_passes(
    defense: str, standard: nn.Module, robust: nn.Module, digits: Split
) -> None:
    honest = standard if defense == "standard" else robust
    pieces: list[int] = []
    probe, suite, ledger = examined(honest, digits)
    stream = torch.get_rng_state()
    closer = audit(probe, suite, ledger, pieces.append)
    assert set(verdicts(closer.checks).values()) == {"pass"}, closer.checks
    assert sum(pieces) == PIECES
    assert [row.attack for row in closer.controls] == ["control"]
    assert closer.controls[0].accuracy == (~ledger.misclassified).mean()
    assert torch.equal(torch.get_rng_state(), stream)
    at_radius = [p.row.accuracy for p in closer.curve if p.row.threat == PROBE.threat]
    assert min(at_radius) >= (~ledger.worst_case(PROBE.threat)).mean() - 0.03


# --- each check, at its thresholds --------------------------------------------------------------

N = 1000


class Pixel(nn.Module):
    """Ten classes, of which the one pixel decides between the first two."""

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) - 0.5
        return torch.cat([-score, score, score.new_full((len(x), 8), -9.0)], 1)


def pixels(values: Sequence[float]) -> Split:
    images = (255 * torch.tensor(values)).round().to(torch.uint8).view(-1, 1, 1, 1)
    return Split(images, (images.flatten() > 127).long())


@dataclass(frozen=True)
class Planted(Probe):
    """A probe that leaves as many of 1,000 images as is planted; attacks are not run."""

    standing: Callable[[Attack, str], int] = lambda attack, name: 500

    def broken(self, attack: Attack, name: str, **keys: Any) -> Any:
        return np.arange(N) >= self.standing(attack, name)

    def wrong(self, *, draw: str = "votes") -> Any:
        return np.arange(N) >= 500

    @property
    def found(self) -> Any:
        return self.broken(self.attack, "probe")


def planted(standing: Callable[[Attack, str], int | None]) -> list[Check]:
    """Checks where half of the images stand everywhere, and chance at linf 0.5."""

    def count(attack: Attack, name: str) -> int:
        said = standing(attack, name)
        return said if said is not None else 100 if name == "unbounded" else 500

    probe, _, _ = examined(Pixel().eval(), pixels([0.2, 0.8]), {"pgd": PROBE})
    by_suite = np.arange(N) >= count(PROBE, "suite")
    suite = {"pgd": PROBE}
    ledger = entered({"pgd": Outcome(PROBE.threat, by_suite, np.zeros(N), np.zeros(N), 0.0)})
    return audit(Planted(probe.subject, PROBE, standing=count), suite, ledger).checks


def entered(outcomes: dict[str, Outcome]) -> Ledger:
    """A ledger of 1,000 images that are all classified correctly."""
    places = np.arange(N)
    return Ledger(places, np.zeros(N, int), np.zeros(N, int), np.zeros(N), 0.0, outcomes=outcomes)


def at_name(wanted: str) -> Callable[[int], Callable[[Attack, str], int | None]]:
    return lambda count: lambda attack, name: count if name == wanted else None


def curve_at(key: str, value: float) -> Callable[[int], Callable[[Attack, str], int | None]]:
    return lambda count: (
        lambda attack, name: (
            count if name.startswith("curve") and vars(attack)[key] == value else None
        )
    )


# Which figure is planted; how many images stand, and the verdicts on them.
THRESHOLDS = {
    CONTROL: (at_name("control pgd"), {500: "pass", 470: "pass", 468: "fail"}),
    EPS_RISE: (curve_at("eps", 1.5 * EPS), {550: "pass", 551: "warn", 900: "warn"}),
    STEPS_RISE: (curve_at("steps", 10), {550: "pass", 551: "warn", 900: "warn"}),
    DOUBLING: (curve_at("steps", 80), {450: "pass", 449: "warn", 10: "warn"}),
    RESTARTS: (at_name("restarts"), {550: "pass", 551: "warn", 900: "warn"}),
    ONE_STEP: (at_name("one step"), {450: "pass", 449: "warn", 10: "warn"}),
    OVERRATED: (at_name("suite"), {300: "pass", 299: "warn", 10: "warn"}),
    OVERLOOKED: (at_name("suite"), {505: "pass", 506: "warn", 520: "warn", 521: "fail"}),
    NOISE: (at_name("random noise"), {495: "pass", 494: "warn", 480: "warn", 479: "fail"}),
    UNBOUNDED: (at_name("unbounded"), {100: "pass", 101: "warn", 200: "warn", 201: "fail"}),
    SMALLER: (at_name("inside 0.75"), {480: "pass", 479: "warn", 450: "warn", 449: "fail"}),
    BLACK_BOX: (at_name("black box"), {480: "pass", 479: "warn", 450: "warn", 449: "fail"}),
}


def test_all_planted_checks_pass_where_nothing_is_wrong() -> None:
    assert set(verdicts(planted(lambda attack, name: None)).values()) == {"pass"}


@pytest.mark.parametrize("check", THRESHOLDS)
def test_each_check_is_graded_by_its_thresholds(check: str) -> None:
    plant, expected = THRESHOLDS[check]
    for count, verdict in expected.items():
        found = verdicts(planted(plant(count)))
        assert found[check] == verdict, count
        # A rise at one point of a curve is a fall at the next one, which is no fault.
        assert {name for name, said in found.items() if said != "pass"} <= {check}


def test_a_curve_may_fall_as_it_likes() -> None:
    for plant in (curve_at("steps", 1), curve_at("eps", 0.0)):
        assert set(verdicts(planted(plant(900))).values()) == {"pass"}
    assert _largest_rise([90.0, 40.0, 10.0, 0.0]) == 0
    assert _largest_rise([90.0, 91.0, 10.0, 14.5, 14.0]) == 4.5


def test_a_figure_that_is_no_number_does_not_pass() -> None:
    assert graded("", float("nan"), 1, 3).verdict != "pass"


# Rows have the names that users give them.
SUITE: dict[str, Attack] = {"square_of_mine_is_pgd": APGD(), "black": Square()}


def found_by(*, gradients: int, square: int) -> Ledger:
    """Of 1,000 images the first are broken by gradients, others by Square, which saw the rest."""
    places, zeros = np.arange(N), np.zeros(N)
    by_gradients, by_square = places < gradients, places < gradients + square
    who = (by_gradients, places >= 0), (by_square, ~by_gradients)
    return entered(
        {
            name: Outcome(Threat(Norm.linf, EPS), broken, zeros, zeros, 0.0, attacked)
            for name, (broken, attacked) in zip(SUITE, who, strict=True)
        }
    )


def black_box(ledger: Ledger, found: int = 0, targeted: int = 0) -> Check:
    """The check where the probe, and a search for each class, find the first so many images."""
    searches: list[str] = []

    def broken(attack: Attack, name: str, among: Any) -> Any:
        searches.append(name)
        return among & (np.arange(N) < targeted)

    probe = SimpleNamespace(
        attack=PROBE, rows=..., found=np.arange(N) < found, broken=broken,
        subject=SimpleNamespace(num_classes=10),
    )  # fmt: skip
    look = measured(probe, np.zeros(N, bool), SUITE, ledger)
    check = look.black_box(look.by_gradients(), by_labels=False)
    # It is not made where there is nothing to decide.
    assert bool(searches) or check.figure == 0
    return check


@pytest.mark.parametrize(
    ("square", "verdict"), [(0, "pass"), (20, "pass"), (21, "warn"), (50, "warn"), (51, "fail")]
)
def test_what_square_alone_broke_counts_for_the_black_box(square: int, verdict: str) -> None:
    check = black_box(found_by(gradients=400, square=square))
    assert check.figure == pytest.approx(square / 10)
    assert check.verdict.value == verdict


def test_what_the_probe_found_as_well_needs_no_black_box() -> None:
    assert black_box(found_by(gradients=400, square=30), found=410).figure == pytest.approx(2)


def test_a_weak_suite_is_no_hidden_gradient() -> None:
    """Of 50 images that only Square broke, a search for each class breaks 40 by gradients."""
    check = black_box(found_by(gradients=400, square=50), targeted=440)
    assert check.figure == pytest.approx(1)
    assert check.verdict == "pass"


def test_where_all_attacks_see_all_images_the_order_does_not_matter() -> None:
    ledger = found_by(gradients=400, square=30)
    everywhere = {name: replace(o, attacked=None) for name, o in ledger.outcomes.items()}
    for names in (list(SUITE), list(SUITE)[::-1]):
        ledger.outcomes = {name: everywhere[name] for name in names}
        assert black_box(ledger).figure == pytest.approx(3)


@pytest.mark.parametrize("threat", [Threat(Norm.linf, 2 * EPS), Threat(Norm.l2, 2 * EPS)])
def test_attacks_of_other_threat_models_are_not_held_against_the_probe(threat: Threat) -> None:
    """They may find more by reaching further, which says nothing about gradients."""
    ledger = found_by(gradients=400, square=0)
    _, black = SUITE
    further = replace(ledger.outcomes[black], threat=threat, broken=np.arange(N) < 900)
    ledger.outcomes[black] = further
    probe = SimpleNamespace(
        attack=PROBE, rows=..., found=np.arange(N) < 400,
        broken=lambda attack, name, among: np.arange(N) < 400,
    )  # fmt: skip
    look = measured(probe, np.arange(N) < 400, SUITE, ledger)
    assert look.overrated().figure == look.overlooked().figure == 0
    assert look.black_box(look.by_gradients(), by_labels=False).figure == 0


@pytest.mark.parametrize(
    ("gradients", "verdict"),
    [(250, "pass"), (450, "pass"), (451, "warn"), (1000, "warn")],
)
def test_a_probe_that_the_suite_leaves_far_behind_is_named(gradients: int, verdict: str) -> None:
    """The probe leaves 750 of 1,000 images standing, and the suite all but so many."""
    probe = SimpleNamespace(attack=PROBE, rows=...)
    look = measured(probe, np.arange(N) < 250, SUITE, found_by(gradients=gradients, square=0))
    check = look.overrated()
    assert check.figure == pytest.approx((gradients - 250) / 10)
    assert check.verdict.value == verdict


def test_probe_and_suite_are_compared_on_the_images_of_the_probe() -> None:
    probe = SimpleNamespace(attack=PROBE, rows=np.arange(300, 500))
    for gradients, figure in ((300, 0), (320, 10)):
        ledger = found_by(gradients=gradients, square=0)
        look = measured(probe, np.zeros(200, bool), SUITE, ledger)
        assert look.overrated().figure == pytest.approx(figure)
        assert look.overlooked().figure == pytest.approx(-figure)


@pytest.mark.parametrize(
    ("met", "verdict"), [(0, "pass"), (1, "warn"), (10, "warn"), (11, "fail"), (1000, "fail")]
)
def test_passes_without_numbers_are_a_share_of_all_passes(met: int, verdict: str) -> None:
    ledger = found_by(gradients=0, square=0)
    white, black = SUITE
    ledger.outcomes[black] = replace(
        ledger.outcomes[black], forward_passes=300, backward_passes=300, non_finite=met
    )
    ledger.outcomes[white] = replace(ledger.outcomes[white], forward_passes=400)
    check = _non_finite(ledger)
    assert check.figure == pytest.approx(met / 10)
    assert check.verdict.value == verdict


class Below(nn.Module):
    """Constant logits, or `given` ones, for pixels below 0.3; nothing wrong above."""

    def __init__(self, given: float) -> None:
        super().__init__()
        self.given = given

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1)
        score = torch.where(score < 0.3, torch.full_like(score, self.given), score - 0.5)
        return torch.cat([-score, score], 1)


def gradients(model: nn.Module, data: Split) -> dict[str, Verdict]:
    probe, _, _ = examined(model.eval(), data, {})
    found = measured(probe, np.zeros(data.size, bool)).gradients(gradient_shares(probe))
    return {name: verdict for name, verdict in verdicts(found).items() if name != MISLEADING}


@pytest.mark.parametrize(
    ("count", "verdict"), [(1, "pass"), (2, "warn"), (10, "warn"), (11, "fail")]
)
def test_images_without_a_gradient_are_counted(count: int, verdict: str) -> None:
    data = pixels([0.1] * count + [0.7] * (100 - count))
    assert gradients(Below(-0.4), data) == {ZERO: verdict, NO_NUMBERS: "pass"}


@pytest.mark.parametrize(("count", "verdict"), [(0, "pass"), (1, "warn"), (2, "fail")])
def test_images_whose_gradient_is_no_number_are_counted(count: int, verdict: str) -> None:
    data = pixels([0.1] * count + [0.7] * (100 - count))
    assert gradients(Below(torch.nan), data) == {ZERO: "pass", NO_NUMBERS: verdict}


class OnBytes(nn.Module):
    """Flat at each byte, or next to each of them only."""

    def __init__(self, *, flat_there: bool) -> None:
        super().__init__()
        self.flat_there = flat_there

    def forward(self, x: Tensor) -> Tensor:
        off = (255 * x - (255 * x).detach().round()).flatten(1)
        there = off.abs() < 1e-3
        score = torch.where(there if self.flat_there else ~there, 0 * off, off)
        return torch.cat([-score, score], 1)


@pytest.mark.parametrize("flat_there", [True, False])
def test_gradients_are_looked_at_on_the_images_and_next_to_them(flat_there: bool) -> None:
    data = pixels([0.2, 0.8] * 50)
    assert gradients(OnBytes(flat_there=flat_there), data)[ZERO] == "fail"


# --- outputs ------------------------------------------------------------------------------------


class Jittered(nn.Module):
    """Draws from torch's global stream whenever it is asked, without saying so."""

    def forward(self, x: Tensor) -> Tensor:
        score = 20 * (x.flatten(1) - 0.5 + 0.1 * torch.randn(len(x), 1))
        return torch.cat([-score, score], 1)


class Seen(nn.Module):
    """The pixel normalised by BatchNorm decides between two classes."""

    def __init__(self, mean: float, *, tracks: bool = True) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1, affine=False, track_running_stats=tracks)
        if tracks:
            self.norm.running_mean = torch.tensor([mean])

    def forward(self, x: Tensor) -> Tensor:
        score = self.norm(x.flatten(1))
        return torch.cat([-score, score], 1)


def outputs(model: nn.Module, data: Split) -> dict[str, Verdict]:
    x = data.images.float() / 255
    return verdicts(_outputs(model.eval(), x, data.labels))


SPREAD = pixels([0.1, 0.3, 0.42, 0.58, 0.7, 0.9] * 10)


def test_outputs_of_an_honest_model_pass() -> None:
    assert set(outputs(Pixel(), SPREAD).values()) == {"pass"}


def test_probabilities_are_named() -> None:
    """Attacks climb what is in front of the softmax, so that the figure stands."""
    assert outputs(nn.Sequential(Pixel(), nn.Softmax(1)), SPREAD)[PROBABILITIES] == "warn"


def test_randomness_has_to_be_declared() -> None:
    noisy = Pixel()
    Gaussian(0.3, predict=True).install(noisy, 0)
    assert outputs(noisy, SPREAD)[UNDECLARED] == "pass"
    assert outputs(Jittered(), SPREAD)[UNDECLARED] == "fail"
    assert outputs(Seen(0.5, tracks=False), SPREAD)[UNDECLARED] == "fail"


@pytest.mark.parametrize(
    ("lost", "verdict"), [(0, "pass"), (5, "pass"), (6, "warn"), (20, "warn"), (21, "fail")]
)
def test_foreign_running_statistics_are_seen(lost: int, verdict: str) -> None:
    """By a mean of 0.6 in place of 0.5, pixels between them change their class."""
    far = 50 - lost
    data = pixels([0.9] * far + [0.55] * lost + [0.45] * lost + [0.1] * far)
    assert outputs(Seen(0.6), data)[BATCHNORM] == verdict
    assert outputs(Seen(0.5), data)[BATCHNORM] == "pass"


# --- the control --------------------------------------------------------------------------------


class Astray(BallAttack):
    """Moves by 0.3, whatever its radius is."""

    def search(self, surrogate: AttackLoss, x: Tensor, generator: torch.Generator) -> Tensor:
        return x + 0.3 * (0.5 - x).sign()


def control_of(model: nn.Module, attacks: Mapping[str, Attack]) -> tuple[Audit, Ledger]:
    probe, suite, ledger = examined(model.eval(), SPREAD, attacks, eot=1, votes=5)
    return audit(probe, suite, ledger), ledger


def test_an_attack_that_leaves_the_ball_is_seen_by_the_control() -> None:
    """Its images are invalid at radius 0, and therefore break nothing."""
    closer, _ = control_of(Pixel(), {"pgd": PROBE, "astray": Astray()})
    assert verdicts(closer.checks)[INVALID] == "fail"
    assert verdicts(closer.checks)[CONTROL] == "pass"


@pytest.mark.parametrize("attacks", [{}, {"none": NoAttack()}])
def test_the_control_of_a_suite_without_a_radius_is_the_clean_accuracy(
    attacks: dict[str, Attack],
) -> None:
    data = Split(SPREAD.images, 1 - SPREAD.labels)
    probe, suite, ledger = examined(Pixel().eval(), data, attacks)
    closer = audit(probe, suite, ledger)
    assert closer.controls[0].accuracy == 0
    assert verdicts(closer.checks)[CONTROL] == "pass"


def test_the_control_spends_little() -> None:
    """500 queries and five restarts of 20 steps would find nothing more at radius 0."""
    asked: list[Attack] = []

    class Asked(Planted):
        def broken(self, attack: Attack, name: str, **keys: Any) -> Any:
            asked.extend([attack] if name.startswith("control") else [])
            return np.arange(N) >= 500

    suite: dict[str, Attack] = {
        "pgd": replace(PROBE, restarts=5),
        "square": Square(queries=500),
        "none": NoAttack(),
    }
    probe, _, _ = examined(Pixel().eval(), pixels([0.2, 0.8]), {})
    ledger = found_by(gradients=0, square=0)
    ledger.outcomes = dict.fromkeys(suite, ledger.outcomes["black"])
    audit(Asked(probe.subject, PROBE), suite, ledger)
    assert asked == [
        replace(PROBE, eps=0.0, steps=3), replace(Square(queries=50), eps=0.0)
    ]  # fmt: skip


# --- random models ------------------------------------------------------------------------------


def test_a_model_that_hides_its_randomness_fails_and_moves_no_global_stream() -> None:
    torch.manual_seed(7)
    stream = torch.get_rng_state()
    first, _ = control_of(Jittered(), {"pgd": PROBE})
    assert torch.equal(torch.get_rng_state(), stream)
    assert verdicts(first.checks)[UNDECLARED] == "fail"
    torch.manual_seed(8)
    second, _ = control_of(Jittered(), {"pgd": PROBE})
    assert first == second


def test_a_random_model_gets_rows_of_its_own() -> None:
    noisy = Pixel()
    Gaussian(0.1, predict=True).install(noisy, 0)
    closer, _ = control_of(noisy, {"pgd": PROBE})
    assert [row.attack for row in closer.controls] == [
        "control", "noise_off", "noise_off_attacked", "noise_fixed",
        "eot_1", "eot_5", "eot_20", "eot_80",
    ]  # fmt: skip
    assert [point.eot for point in closer.curve if point.curve == "eot"] == [1, 5, 20, 80]
    assert verdicts(closer.checks)[UNDECLARED] == "pass"
    # Without noise the model is right on all images, and at 0.1 from the boundary it falls.
    off, attacked = closer.controls[1:3]
    assert (off.accuracy, off.threat.eps) == (1, 0)
    assert (attacked.accuracy, attacked.threat.eps) == (pytest.approx(2 / 3), EPS)


@pytest.mark.parametrize(
    ("standing", "verdict"), [(490, "pass"), (489, "warn"), (470, "warn"), (469, "fail")]
)
def test_more_draws_must_not_pay(
    monkeypatch: pytest.MonkeyPatch, standing: int, verdict: str
) -> None:
    def draws(probe: Probe, advance: Advance) -> list[Point]:
        accuracies = zip((1, 5, 20, 80), (900, 600, 500, standing), strict=True)
        return [
            Point("eot", 10, eot, Row("eot", Threat(Norm.linf, EPS), N, count / N, 0, 1))
            for eot, count in accuracies
        ]

    monkeypatch.setattr("robusttrain.evaluation.audit.over_draws", draws)
    noisy = Pixel()
    Gaussian(0.1, predict=True).install(noisy, 0)
    probe, _, _ = examined(noisy.eval(), pixels([0.2, 0.8]), {}, eot=1, votes=2)
    checks = audit(
        Planted(probe.subject, PROBE, standing=lambda attack, name: 100), {}, entered({})
    ).checks
    assert verdicts(checks)["80 instead of 20 draws gain"] == verdict
