"""The radius of every image, on a network whose every radius is known in closed form."""

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

from robusttrain.attacks import Attack
from robusttrain.attacks.apgd import APGD
from robusttrain.attacks.ddn import DDN
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.fmn import FMN
from robusttrain.attacks.none import NoAttack
from robusttrain.attacks.objectives import AttackObjective
from robusttrain.attacks.pgd import PGD
from robusttrain.attacks.uniform import Uniform
from robusttrain.data import Split, as_input
from robusttrain.errors import InputError
from robusttrain.evaluation import Evaluation
from robusttrain.evaluation.pipeline import EvaluationCache, EvaluationResult, Plan, run_evaluation
from robusttrain.evaluation.radii import ImageRadii, levels_of
from robusttrain.evaluation.settings import Radii
from robusttrain.report.terminal import Terminal
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball

EPS = {Norm.linf: 0.045, Norm.l2: 0.06, Norm.l1: 0.055}
THREATS = tuple(Threat(norm, eps) for norm, eps in EPS.items())
# The l1 ball lies in the linf ball.
NESTED = (Threat(Norm.linf, 0.1), Threat(Norm.l1, 0.05))
RESOLUTION = 2
every_threat = pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm.value)


def network() -> nn.Sequential:
    """Class 1 where x_0 + 0.9 x_1 is above 1, and class 2 where x_1 is above 0.6; else class 0."""
    last = nn.Linear(2, 3)
    with torch.no_grad():
        last.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.9], [0.0, 1.0]]))
        last.bias.copy_(torch.tensor([0.0, -1.0, -0.6]))
    return nn.Sequential(nn.Flatten(1), last).eval()


def data(count: int = 30) -> Split:
    """Images of class 0, far from the faces of the box; the first five are labelled otherwise."""
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(80, 150, (9 * count, 1, 1, 2), generator=draws).to(torch.uint8)
    images = images[network()(as_input(images)).argmax(1) == 0][:count]
    labels = torch.zeros(count, dtype=torch.long)
    labels[:5] = 1
    return Split(images, labels)


def exact(norm: Norm) -> NDArray[np.float64]:
    """The distance of each image from the nearest wrong point, (N,)."""
    split, last = data(), network()[1].double()
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        lead = -last(as_input(split.images).double().flatten(1))[:, 1:]
        slopes = ball(Threat(norm, 0)).dual_norm(last.weight[1:])
        away = (lead / slopes).amin(1)
    return np.where(split.labels != 0, 0.0, away.numpy())


def suite(threat: Threat) -> dict[str, Attack]:
    margin = AttackObjective.margin
    own = APGD(norm=threat.norm, eps=threat.eps, steps=15, objective=margin, targets=2, restarts=1)
    return {"apgd": own}


def fmn(threat: Threat) -> dict[str, Attack]:
    return {"fmn": FMN(norm=threat.norm, eps=threat.eps, targets=2)}


def found(
    chosen: Evaluation,
    *threats: Threat,
    folder: Path | None = None,
    model: nn.Module | None = None,
) -> EvaluationResult:
    workplace = EvaluationCache(folder, None) if folder else None
    terminal = Terminal(Console(file=io.StringIO()))
    plan = Plan(chosen.under_each(threats[0], threats), threats[0], 0, threats)
    result = run_evaluation(model or network(), data(), plan, workplace, terminal).found
    assert result is not None
    return result


def settings(threat: Threat, nearest: dict[str, Attack] | None = None, **others: Any) -> Evaluation:
    radii = Radii(resolution=RESOLUTION, attacks=fmn(threat) if nearest is None else nearest)
    return Evaluation(**{"attacks": suite(threat), "radii": radii, **others})


@cache
def bracketed(threat: Threat) -> EvaluationResult:
    """What the suite and FMN find without an audit."""
    return found(settings(threat), threat)


@every_threat
def test_the_bracket_holds_the_closed_form_and_is_tight(threat: Threat) -> None:
    (radii,) = bracketed(threat).radii
    truth = exact(threat.norm)
    broken = np.isfinite(radii.upper)
    assert (broken == (truth <= radii.largest)).all()
    assert 10 < broken.sum() < 30
    ratio = radii.upper[broken & (truth > 0)] / truth[broken & (truth > 0)]
    assert ratio.min() > 1 - 1e-5
    assert ratio.max() < 1.05
    assert (radii.upper[truth == 0] == 0).all()
    assert set(radii.by[truth == 0]) == {"clean"}
    assert set(radii.by[~broken]) == {""}
    assert radii.lower is not None
    assert (radii.lower <= truth * (1 + 1e-6)).all()
    assert (radii.lower <= radii.upper).all()


@every_threat
def test_bounds_of_a_linear_network_prove_the_level_below_its_radius(threat: Threat) -> None:
    (radii,) = bracketed(threat).radii
    levels = np.array([0.0, *radii.levels])
    assert radii.lower is not None
    below = [levels[levels < truth].max(initial=0) for truth in exact(threat.norm)]
    assert radii.lower.tolist() == below
    checks = {check.check: check for check in radii.checks}
    assert checks["radii broken below a proven one"].verdict == "pass"


@every_threat
def test_the_suite_alone_comes_down_to_the_first_level_that_holds(threat: Threat) -> None:
    (radii,) = found(settings(threat, {}), threat).radii
    truth, step = exact(threat.norm), threat.eps / RESOLUTION
    broken = np.isfinite(radii.upper)
    assert (broken == (truth <= radii.largest)).all()
    assert (radii.upper[broken] >= truth[broken] * (1 - 1e-5)).all()
    assert (radii.upper[broken] <= np.ceil(truth[broken] / step) * step + 1e-9).all()


@pytest.mark.parametrize("threats", [THREATS[:1], NESTED], ids=len)
def test_the_radii_agree_with_the_worst_case_and_with_the_curve(
    threats: tuple[Threat, ...],
) -> None:
    """The suite is weak, so that the minimum-norm attack finds images that it has missed."""
    attacks: dict[str, Attack] = {"uniform": Uniform(eps=threats[0].eps)}
    chosen = settings(
        threats[0], attacks=attacks, probe=PGD(eps=threats[0].eps, steps=5), audit=True,
        probe_samples=15, save_adversarial=True,
    )  # fmt: skip
    result = found(chosen, *threats)
    rows = chosen.probed(30).numpy()
    new = 0
    for radii in result.radii:
        threat = radii.threat
        worst = result.ledger.worst_case(threat)
        assert ((radii.upper <= threat.eps) == worst).all()
        for point in result.audit.curve:
            if point.curve == "eps" and point.row.threat.norm is threat.norm:
                assert (radii.upper[rows] > point.row.threat.eps).mean() <= point.row.accuracy
        name = "radii" if len(threats) == 1 else f"radii_{threat.norm}"
        outcome = result.ledger.outcomes[name]
        assert (outcome.size <= threat.eps).all()
        before = [o.broken for o in result.ledger.outcomes.values() if o is not outcome]
        new += int((outcome.broken & ~np.any(before, axis=0)).sum())
        kept = torch.from_numpy(result.ledger.adversarial[threat])
        assert ((network()(kept).argmax(1) != data().labels).numpy() == worst).all()
        size = ball(threat).norm(kept - as_input(data().images))
        assert (size <= threat.eps * (1 + 1e-5)).all()
    assert new > 0


def test_the_curves_count_the_brackets() -> None:
    threat = THREATS[0]
    result = bracketed(threat)
    (radii,) = result.radii
    assert radii.lower is not None
    for point in result.audit.curve:
        eps = point.row.threat.eps
        held = radii.upper > eps if point.curve == "radii" else radii.lower >= eps
        assert point.row.accuracy == held.mean()
        assert (point.steps, point.eot) == (None, None)
    names = [point.curve for point in result.audit.curve]
    assert names == ["radii"] * (4 * RESOLUTION + 1) + ["proven"] * 4 * RESOLUTION


def test_a_resumed_search_takes_its_finished_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of one level, norm or attack must not be taken for another."""
    threats = THREATS[:2]
    chosen = settings(threats[0])
    fresh = found(chosen, *threats)
    interrupted = tmp_path / "pieces"
    with monkeypatch.context() as patch:
        patch.setattr("robusttrain.evaluation.radii._proven", _stop)
        with pytest.raises(KeyboardInterrupt):
            found(chosen, *threats, folder=interrupted)
    made = len(list(interrupted.glob("*.pt")))
    resumed = found(chosen, *threats, folder=interrupted)
    assert len(list(interrupted.glob("*.pt"))) > made
    with monkeypatch.context() as patch:
        for kind in (FMN, APGD):
            patch.setattr(kind, "__call__", _stop)
        again = found(chosen, *threats, folder=interrupted)
    for one, two, three in zip(fresh.radii, resumed.radii, again.radii, strict=True):
        assert np.array_equal(one.upper, two.upper)
        assert np.array_equal(one.upper, three.upper)
        assert one.by.tolist() == two.by.tolist() == three.by.tolist()


def _stop(*arguments: object, **others: object) -> None:
    raise KeyboardInterrupt


class Noisy(nn.Module):
    """The network with noise in its logits that it does not declare."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        return logits + 0.01 * torch.randn_like(logits)


def test_a_random_model_is_searched_by_the_suite_alone_and_nothing_is_proven() -> None:
    threat = THREATS[0]
    attacks: dict[str, Attack] = {"pgd": PGD(eps=threat.eps, steps=5)}
    chosen = settings(threat, attacks=attacks, eot=2, votes=5)
    result = found(chosen, threat, model=Noisy().eval())
    (radii,) = result.radii
    assert radii.lower is None
    assert not radii.checks
    assert set(radii.by) == {"", "clean", "pgd"}
    assert ((radii.upper <= threat.eps) == result.ledger.worst_case(threat)).all()


def test_a_proof_that_something_breaks_is_a_failure_of_the_audit() -> None:
    upper, lower = np.array([0.0, 0.1, np.inf]), np.array([0.0, 0.1, 0.2])
    held = ImageRadii(THREATS[0], [0.1, 0.2], upper, np.array(["clean", "fmn", ""]), lower)
    assert [check.verdict for check in held.checks] == ["pass"]
    wrong = ImageRadii(THREATS[0], [0.1, 0.2], upper, held.by, np.array([0.0, 0.2, 0.2]))
    assert [(check.verdict, check.figure) for check in wrong.checks] == [("fail", 1)]


@given(
    eps=st.floats(1e-4, 1.0), resolution=st.integers(1, 40), largest=st.floats(1, 8),
    norm=st.sampled_from(list(Norm)),
)  # fmt: skip
def test_levels_have_eps_itself_and_end_at_the_largest_radius(
    eps: float, resolution: int, largest: float, norm: Norm
) -> None:
    levels = levels_of(Radii(largest, resolution), Threat(norm, eps))
    assert eps in levels
    assert levels == sorted(set(levels))
    assert levels[-1] == (min(1.0, largest * eps) if norm is Norm.linf else largest * eps)
    steps = np.diff([0.0, *levels])
    assert (steps <= eps / resolution * (1 + 1e-9)).all()


STILL = Threat(Norm.linf, 0)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Radii(resolution=0), "resolution"),
        (lambda: Radii(largest=0.5), "largest"),
        (lambda: Radii(attacks={"pgd": PGD()}), "attacks.pgd"),
        (lambda: Radii(attacks={"none": NoAttack()}), "attacks.none"),
        (lambda: settings(THREATS[0], union_only=True), "union_only"),
        (lambda: settings(THREATS[0], verify=True), "radii"),
        (lambda: settings(STILL).under_each(STILL, [STILL]), "eps"),
        (
            lambda: settings(THREATS[1], {"ddn": DDN()}).under_each(THREATS[1], THREATS),
            "evaluation.radii.attacks.ddn.norm",
        ),
        (lambda: Evaluation({"radii": FGSM()}), "attacks"),
        (lambda: Evaluation({"radii_l2": FGSM()}), "attacks"),
    ],
)
def test_what_has_no_radii_is_refused(make: Callable[[], object], key: str) -> None:
    with pytest.raises(InputError) as caught:
        make()
    assert caught.value.key == key
