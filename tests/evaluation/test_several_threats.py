"""An evaluation under several threat models, on a network whose every radius is known."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

from robusttrain.attacks import Attack
from robusttrain.attacks.apgd import APGD
from robusttrain.attacks.ddn import DDN
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.msd import MSD
from robusttrain.attacks.none import NoAttack
from robusttrain.attacks.objectives import AttackObjective
from robusttrain.attacks.pgd import PGD
from robusttrain.data import Split, as_input
from robusttrain.errors import InputError
from robusttrain.evaluation import Evaluation
from robusttrain.evaluation.findings import Audit, Check, Verdict
from robusttrain.evaluation.pipeline import EvaluationCache, EvaluationResult, Plan, run_evaluation
from robusttrain.report.ledger import AVERAGE, GEOMETRIC_MEAN, Ledger, Outcome, wilson
from robusttrain.report.terminal import Terminal
from robusttrain.threat import Norm, Threat, of_radii
from robusttrain.threat.balls import ball
from robusttrain.training.validation import Validator

# Each ball contains a wrong point for some of the images, and none contains another.
RADII = {"linf": 0.045, "l2": 0.06, "l1": 0.07}
THREATS = of_radii(RADII)
PROBE = PGD(eps=RADII["linf"], steps=10)


class TwoPixels(nn.Module):
    """Class 1 where x_0 + 0.9 x_1 is above 1, and class 2 where x_1 is above 0.6; else class 0.

    linf goes farthest towards class 1, and l1 towards class 2.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.0, 0.0], [1.0, 0.9], [0.0, 1.0]]))
        self.bias = nn.Parameter(torch.tensor([0.0, -1.0, -0.6]))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


def data(count: int = 120) -> Split:
    """Images of class 0, far from the faces of the box; the first five are labelled otherwise."""
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(80, 150, (9 * count, 1, 1, 2), generator=draws).to(torch.uint8)
    images = images[TwoPixels()(as_input(images)).argmax(1) == 0][:count]
    labels = torch.zeros(count, dtype=torch.long)
    labels[:5] = 1
    return Split(images, labels)


def broken(threat: Threat) -> NDArray[np.bool_]:
    """Which images the ball around them has a wrong point for, in closed form."""
    split, model = data(), TwoPixels()
    x = as_input(split.images).double()
    lead = x.flatten(1) @ model.weight.double().T + model.bias.double()
    reach = threat.eps * ball(threat).dual_norm(model.weight.double())
    return np.asarray(((split.labels != 0) | (lead + reach > 0)[:, 1:].any(1)).detach())


def settings(**others: Any) -> Evaluation:
    attacks: dict[str, Attack] = {
        "fgsm": FGSM(eps=RADII["linf"]),
        "apgd": APGD(eps=RADII["linf"], steps=20, objective=AttackObjective.margin, targets=2),
    }  # fmt: skip
    return Evaluation(**{"attacks": attacks, **others}).under_each(THREATS[0], THREATS)


def found(chosen: Evaluation, folder: Path | None = None) -> EvaluationResult:
    workplace = EvaluationCache(folder, None) if folder else None
    terminal = Terminal(Console(file=io.StringIO()))
    plan = Plan(chosen, THREATS[0], 0, THREATS)
    result = run_evaluation(TwoPixels().eval(), data(), plan, workplace, terminal).found
    assert result is not None
    return result


def reported(chosen: Evaluation) -> pd.DataFrame:
    result = found(chosen)
    return result.ledger.report(THREATS[0], result.rows, result.audit.verdict, THREATS)


def test_each_threat_model_and_the_union_have_their_exact_accuracy() -> None:
    table = reported(settings())
    worst = table[table["attack"] == "worst_case"]
    exact = [1 - broken(threat).mean() for threat in THREATS]
    assert worst["norm"].tolist() == list(RADII)
    assert worst["eps"].tolist() == list(RADII.values())
    assert worst["accuracy"].tolist() == pytest.approx(exact)
    union = np.any([broken(threat) for threat in THREATS], axis=0)
    last = table.iloc[-1]
    assert last["attack"] == "union"
    assert last["accuracy"] == pytest.approx(1 - union.mean())
    assert last["accuracy"] < min(exact)
    means = table.set_index("attack")["accuracy"]
    assert means[AVERAGE] == pytest.approx(sum(exact) / 3)
    assert means[GEOMETRIC_MEAN] == pytest.approx(math.prod(exact) ** (1 / 3))


def test_the_union_alone_is_the_same_with_less_work() -> None:
    whole, short = found(settings()).ledger, found(settings(union_only=True)).ledger
    assert np.array_equal(whole.union, short.union)
    tried = [sum(_tried(ledger)) for ledger in (whole, short)]
    assert tried[1] < tried[0]
    table = short.report(THREATS[0], several=THREATS)
    worst = table[table["attack"] == "worst_case"]
    assert worst["norm"].tolist() == list(RADII)
    assert worst[["accuracy", "ci_low", "ci_high"]].isna().all(axis=None)
    assert not {AVERAGE, GEOMETRIC_MEAN} & {*table["attack"]}


def _tried(ledger: Ledger) -> list[int]:
    return [int(o.attacked.sum()) for o in ledger.outcomes.values() if o.attacked is not None]


def test_the_rows_of_a_union_alone_say_what_is_left_after_each_attack() -> None:
    table = reported(settings(union_only=True))
    left = table[table["attack"].str.contains("_")]["accuracy"].dropna().tolist()
    assert left == sorted(left, reverse=True)
    assert left[-1] == table["accuracy"].iloc[-1]


def test_an_attack_of_a_union_alone_gets_no_image_that_has_fallen() -> None:
    ledger, fallen = found(settings(union_only=True)).ledger, None
    for outcome in ledger.outcomes.values():
        before = ledger.misclassified if fallen is None else fallen
        assert outcome.attacked is not None
        assert not (outcome.attacked & before).any()
        fallen = before | outcome.broken


def test_each_threat_model_is_audited_by_itself(tmp_path: Path) -> None:
    """From pieces as well as afresh: searches of different balls must not be taken for another."""
    chosen = settings(probe=PROBE, audit=True, samples=40)
    fresh, again = found(chosen, tmp_path / "pieces"), found(chosen, tmp_path / "pieces")
    assert fresh.audit.checks == again.audit.checks
    assert {check.threat for check in fresh.audit.checks} == {*THREATS}
    numbers = {threat: sum(c.threat == threat for c in fresh.audit.checks) for threat in THREATS}
    assert len({*numbers.values()}) == 1
    assert {point.row.threat.norm for point in fresh.audit.curve if point.row.threat} == {*Norm}
    table = fresh.ledger.report(THREATS[0], fresh.rows, fresh.audit.verdict)
    probes = table[table["attack"].str.startswith("probe_")]
    assert probes["norm"].tolist() == list(RADII)
    for name, outcome in fresh.ledger.outcomes.items():
        assert (outcome.size <= outcome.threat.eps * (1 + 1e-4)).all(), name


def test_a_threat_model_has_the_verdict_of_its_own_checks() -> None:
    linf, l2, l1 = THREATS

    def check(verdict: Verdict, threat: Threat | None) -> Check:
        return Check("", 0.0, "", verdict, threat)

    audit = Audit([], [], [check(Verdict.passed, linf), check(Verdict.warned, l2)], (linf, l2))
    assert audit.verdict([linf]) == "pass"
    assert audit.verdict([l2]) == audit.verdict([linf, l2]) == "warn"
    assert audit.verdict([l1]) == audit.verdict([linf, l1]) == "none"
    shared = audit._replace(checks=[*audit.checks, check(Verdict.warned, None)])
    assert shared.verdict([linf]) == "warn"
    failed = audit._replace(checks=[*audit.checks, check(Verdict.failed, l2)])
    assert failed.verdict([linf]) == "fail"


def test_attacks_of_their_own_threat_model_are_not_repeated() -> None:
    own = APGD(norm=Norm.l2, eps=2)
    chosen = Evaluation({"pgd": PGD(eps=0.1), "own": own, "still": NoAttack()})
    several = (Threat(Norm.linf, 0.1), Threat(Norm.l2, 1))
    suite = chosen.under_each(several[0], several).attacks
    assert list(suite) == ["pgd_linf", "pgd_l2", "own", "still"]
    assert suite["pgd_l2"] == PGD(norm=Norm.l2, eps=1)
    assert suite["own"] is own


def test_a_single_threat_model_changes_nothing() -> None:
    chosen = Evaluation({"pgd": PGD(eps=0.1)}, probe=PGD(eps=0.1), audit=True)
    assert chosen.under_each(Threat(Norm.linf, 0.1), [Threat(Norm.linf, 0.1)]) is chosen


@pytest.mark.parametrize(
    ("attacks", "others", "threats", "key"),
    [
        ({"pgd": PGD(eps=0.1), "pgd_l2": PGD(eps=0.2)}, {}, THREATS, "evaluation.attacks"),
        ({"ddn": DDN(Norm.l2, 0.1)}, {}, THREATS, "evaluation.attacks.ddn.norm"),
        ({"pgd": PGD()}, {"union_only": True}, THREATS[:1], "evaluation.union_only"),
        ({"msd": MSD({"linf": 0.1, "l2": 1})}, {}, THREATS, "attacks"),
        ({"pgd": PGD()}, {"union_only": True, "audit": True, "probe": PROBE}, THREATS, "audit"),
        ({"average": PGD()}, {}, THREATS, "attacks"),
        ({"probe_l2": PGD()}, {}, THREATS, "attacks"),
    ],
)
def test_what_has_no_meaning_under_several_threat_models_is_refused(
    attacks: dict[str, Attack], others: dict[str, Any], threats: Sequence[Threat], key: str
) -> None:
    own = Threat(Norm.l2 if "ddn" in attacks else Norm.linf, 0.1)
    with pytest.raises(InputError) as caught:
        Evaluation(attacks, **others).under_each(own, threats)
    assert caught.value.key == key


def test_figures_over_several_threat_models_can_be_required() -> None:
    several, alone = (
        settings(require={"union": 0.5}),
        Evaluation(settings().attacks, union_only=True),
    )
    several.refuse_unknown_figures()
    assert {"union", "worst_case", "apgd_l1"} <= {*several.figures}
    assert "worst_case" not in alone.figures
    with pytest.raises(InputError, match=r"require\.union"):
        Evaluation({"pgd": PGD()}, require={"union": 0.5}).refuse_unknown_figures()


def test_the_interval_of_a_mean_holds_however_the_accuracies_depend_on_one_another() -> None:
    """Of 300 test sets at most a twentieth, and some luck, has a mean outside of its interval."""
    draws, n, shares = np.random.default_rng(0), 60, np.array([0.9, 0.5, 0.4])
    missed = dict.fromkeys((AVERAGE, GEOMETRIC_MEAN), 0)
    truth = {AVERAGE: shares.mean(), GEOMETRIC_MEAN: shares.prod() ** (1 / 3)}
    for trial in range(300):
        # The same images are hard in all norms, or in none.
        hardness = draws.random((n, 1 if trial % 2 else 3))
        row = _means(hardness < shares)
        for name, (low, high) in row.items():
            missed[name] += not low <= truth[name] <= high
    assert all(count <= 0.05 * 300 + 9 for count in missed.values()), missed


def _means(right: NDArray[np.bool_]) -> dict[str, tuple[float, float]]:
    """The intervals that a ledger of such outcomes reports."""
    zeros, label = np.zeros(len(right)), np.zeros(len(right), np.int64)
    ledger = Ledger(np.arange(len(right)), label, label, zeros, 0.0)
    ledger.outcomes = {
        threat.norm.value: _outcome(threat, ~right[:, column % right.shape[1]])
        for column, threat in enumerate(THREATS)
    }
    table = ledger.report(THREATS[0], several=THREATS).set_index("attack")
    return {
        name: (table["ci_low"][name], table["ci_high"][name]) for name in (AVERAGE, GEOMETRIC_MEAN)
    }


def _outcome(threat: Threat, broken: NDArray[np.bool_]) -> Outcome:
    zeros = np.zeros(len(broken))
    return Outcome(threat, broken, zeros, zeros, 0.0, prediction=broken.astype(np.int64))


@pytest.mark.parametrize("right", [0, 1, 30, 59, 60])
def test_the_interval_of_a_mean_of_equal_accuracies_contains_theirs(right: int) -> None:
    """The mean is not surer than its parts, which may always be wrong together."""
    flags = np.tile(np.arange(60)[:, None] < right, (1, 3))
    for low, high in _means(flags).values():
        assert low <= wilson(right, 60)[0]
        assert high >= wilson(right, 60)[1]


def test_validation_counts_what_is_right_under_all_threat_models() -> None:
    terminal = Terminal(Console(file=io.StringIO()))
    attack = APGD(eps=0.01, steps=20, objective=AttackObjective.margin, targets=2)
    model = TwoPixels().eval()
    clean, robust = Validator(model, THREATS, 0, terminal)("validation", data(), attack, 50)
    union = np.any([broken(threat) for threat in THREATS], axis=0)
    assert clean == pytest.approx(115 / 120)
    assert robust == pytest.approx(1 - union.mean())
    _, alone = Validator(model, THREATS[1:2], 0, terminal)(
        "one", data(), attack.under(THREATS[1]), 50
    )
    assert alone == pytest.approx(1 - broken(THREATS[1]).mean())
