"""Each verified image has one status, proofs agree with attacks, and nothing fails in silence."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from robusttrain.attacks import Attack
from robusttrain.attacks.none import NoAttack
from robusttrain.attacks.pgd import PGD
from robusttrain.bounds.branching import Decision, Reason, Status
from robusttrain.bounds.inputs import InputSet
from robusttrain.bounds.intervals import Interval
from robusttrain.data import Split
from robusttrain.data.digits import Digits
from robusttrain.errors import InputError
from robusttrain.evaluation import Evaluation, verification
from robusttrain.evaluation.pipeline import EvaluationCache, EvaluationResult, Plan, run_evaluation
from robusttrain.evaluation.settings import Bounds, Certification, Verification
from robusttrain.evaluation.verification import (
    FAILURES,
    MEMORY,
    NO_RULE,
    NOT_REPEATED,
    RANDOM,
    TIME,
    TOO_LOOSE,
    UNREPEATED,
)
from robusttrain.exit_codes import ExitCode
from robusttrain.models.conv_net import ConvNet
from robusttrain.models.madry_cnn import MadryCNN
from robusttrain.models.mlp import MLP
from robusttrain.models.preact_resnet import PreActResNet
from robusttrain.models.small_cnn import SmallCNN
from robusttrain.models.wide_resnet import WideResNet
from robusttrain.report.proofs import BROKEN_PROOFS, EXCEEDED_BOUNDS, ROWS, STATUSES, line, stages
from robusttrain.report.terminal import Terminal
from robusttrain.runs.outcome import Outcome, uncontradicted
from robusttrain.threat import Norm, Threat

SHAPE = (1, 6, 6)
SHORT = Verification(seconds=1.0, steps=3)
INTERVALS_ALONE = Verification(Bounds.intervals, branching=False)


def built(architecture: Any, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = architecture.build(3, SHAPE).eval()
        return model


def data(model: nn.Module, count: int = 12) -> Split:
    """Random images whose labels are right but for the first two."""
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *SHAPE), generator=draws).to(torch.uint8)
    with torch.no_grad():
        labels = model(images.float() / 255).argmax(1)
    labels[:2] = (labels[:2] + 1) % 3
    return Split(images, labels)


def found(
    model: nn.Module,
    chosen: Verification = SHORT,
    *,
    eps: float = 0.03,
    norm: Norm = Norm.linf,
    attack: Attack | None = None,
    images: Split | None = None,
    folder: Path | None = None,
    **others: Any,
) -> EvaluationResult:
    suite = {"pgd": attack or PGD(norm=norm, eps=eps, steps=5)}
    settings = Evaluation(suite, verification=chosen, batch_size=4, **others)
    plan = Plan(settings, Threat(norm, eps), 0)
    workplace = EvaluationCache(folder, None) if folder else None
    terminal = Terminal(Console(file=io.StringIO()))
    result = run_evaluation(model, images or data(model), plan, workplace, terminal).found
    assert result is not None
    return result


def verdicts(result: EvaluationResult) -> dict[str, str]:
    return {check.check: str(check.verdict) for check in result.audit.checks}


def assert_adds_up(result: EvaluationResult, threat: Threat) -> pd.DataFrame:
    samples = result.ledger.samples()
    rows = result.ledger.report(threat, result.rows).set_index("attack")["accuracy"]
    left = rows[[*ROWS.values(), "undecided"]].sum()
    assert (1 - rows["clean"]) + (rows["clean"] - rows["worst_case"]) + left == pytest.approx(1)
    assert rows["verified"] == pytest.approx(rows[[*ROWS.values()]].sum())
    assert set(samples["status"]) <= {*STATUSES}
    assert sum(stages(samples).values()) == len(samples)
    assert ((samples["status"] == "wrong") == (samples["broken_by"] == "clean")).all()
    is_proven, is_undecided = samples["status"] == "proven", samples["status"] == "undecided"
    assert ((samples["proven_by"] != "") == is_proven).all()
    assert (samples["proof_seconds"].notna() == is_proven).all()
    assert ((samples["undecided_because"] != "") == is_undecided).all()
    assert set(verdicts(result).values()) == {"pass"}
    return samples


@pytest.mark.parametrize(
    ("architecture", "norm", "eps"),
    [
        (MLP([8, 8]), Norm.linf, 0.03),
        (MLP([8, 8]), Norm.l2, 0.15),
        (SmallCNN(2), Norm.linf, 0.02),
        (ConvNet([4], [2], [20], contrast=2), Norm.linf, 0.02),
        (MadryCNN([2, 4], 16), Norm.l1, 0.1),
        (PreActResNet([1, 1, 1, 1], 2), Norm.linf, 0.004),
        (WideResNet(10, 1, dropout=0.5), Norm.linf, 1e-4),
    ],
)
def test_statuses_and_rows_add_up_to_all_images(architecture: Any, norm: Norm, eps: float) -> None:
    samples = assert_adds_up(found(built(architecture), eps=eps, norm=norm), Threat(norm, eps))
    assert stages(samples)["wrong"] == 2
    assert "proven" in set(samples["status"])


def test_a_network_trained_on_bounds_is_proven_by_intervals_first() -> None:
    from robusttrain import load_pretrained

    _, test = Digits().load()
    few = Split(test.images[:12], test.labels[:12])
    model = load_pretrained("digits-ibp-0.1").eval()
    samples = assert_adds_up(found(model, eps=0.1, images=few), Threat(Norm.linf, 0.1))
    counted = stages(samples)
    assert counted["proven by intervals"] > 6
    assert line(samples).startswith("12 images: ")


def test_branching_decides_what_bounds_leave_open_and_its_counterexamples_count() -> None:
    """Without attacks every image that is right is left to proofs."""
    model, eps = built(MLP([6, 6])), 0.05
    with torch.no_grad():
        for name, values in model.named_parameters():
            # Biases alone would decide most images.
            values.mul_(0.0 if name.endswith("bias") else 2.0)
    kept = found(model, Verification(), eps=eps, attack=NoAttack(), save_adversarial=True)
    samples = assert_adds_up(kept, Threat(Norm.linf, eps))
    broken = samples["broken_by"] == "branching"
    assert broken.any()
    assert (samples["status"] == "broken").equals(broken)
    undecided = samples.loc[samples["status"] == "undecided", "undecided_because"]
    assert not len(undecided), undecided.tolist()
    whole = kept.ledger.report(Threat(Norm.linf, eps), kept.rows).set_index("attack")
    assert whole.loc["worst_case", "accuracy"] == pytest.approx(1 - (broken.sum() + 2) / 12)
    ((threat, images),) = (kept.ledger.adversarial or {}).items()
    assert threat == Threat(Norm.linf, eps)
    with torch.no_grad():
        now = model(torch.from_numpy(images)).argmax(1).numpy()
    assert (now[broken] != kept.ledger.label[broken]).all()


def test_the_cheapest_method_that_proves_an_image_has_the_proof() -> None:
    model = built(MLP([8, 8]))
    counted = {}
    for name, chosen in {
        "intervals": INTERVALS_ALONE,
        "linear": Verification(Bounds.linear, branching=False),
        "optimised": Verification(Bounds.optimised, branching=False),
        "all": SHORT,
    }.items():
        samples = found(model, chosen).ledger.samples()
        counted[name] = stages(samples)
        undecided = samples.loc[samples["status"] == "undecided", "undecided_because"]
        assert name == "all" or set(undecided) <= {TOO_LOOSE}
    first = {name: each["proven by intervals"] for name, each in counted.items()}
    assert len(set(first.values())) == 1
    linear = [counted[name]["proven by linear bounds"] for name in ("linear", "optimised", "all")]
    assert 0 < linear[0] <= linear[1] == linear[2]
    assert counted["intervals"]["proven by linear bounds"] == 0


def test_without_time_images_are_undecided_for_lack_of_time() -> None:
    result = found(built(MLP([8, 8])), Verification(seconds=1e-9), eps=0.05, attack=NoAttack())
    samples = assert_adds_up(result, Threat(Norm.linf, 0.05))
    undecided = samples.loc[samples["status"] == "undecided", "undecided_because"]
    assert len(undecided)
    assert set(undecided) == {TIME}


class AcrossImages(nn.Module):
    """A mean over the images, which intervals bound, and linear bounds do not go through."""

    def __init__(self) -> None:
        super().__init__()
        self.model = built(MLP([8, 8]))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits + 0 * logits.mean(0, keepdim=True)


class Trembling(AcrossImages):
    """Noise that nobody has declared."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x + 0.01 * torch.randn(x.shape))
        return logits


@pytest.mark.parametrize(("model", "reason"), [(AcrossImages(), NO_RULE), (Trembling(), RANDOM)])
def test_what_has_no_bounds_is_undecided_and_says_why(model: nn.Module, reason: str) -> None:
    images = data(model.model)
    samples = found(model, eps=0.05, attack=NoAttack(), images=images).ledger.samples()
    undecided = samples["status"] == "undecided"
    assert undecided.any()
    assert set(samples.loc[undecided, "undecided_because"]) == {reason}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("broken\nline"), "error: RuntimeError: broken"),
        (MemoryError("too large"), MEMORY),
        (torch.OutOfMemoryError("too large"), MEMORY),
    ],
)
def test_a_method_that_fails_is_counted_beside_its_images(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def failing(*args: Any, **keys: Any) -> None:
        raise error

    monkeypatch.setattr(verification, "margins", failing)
    chosen = Verification(Bounds.linear, branching=False)
    result = found(built(MLP([8, 8])), chosen)
    samples = result.ledger.samples()
    undecided = samples.loc[samples["status"] == "undecided", "undecided_because"]
    assert set(undecided) == {reason}
    (failures,) = (check for check in result.audit.checks if check.check == FAILURES)
    assert (failures.figure, failures.verdict) == (len(undecided), "warn")


def no_ball(inputs: InputSet, coefficients: Tensor) -> Tensor:
    return (coefficients.flatten(2) * inputs.x.flatten(1)).sum(2)


@pytest.mark.parametrize(
    ("owner", "name", "rule", "check"),
    [
        (Interval, "around", lambda x, eps: Interval(x, torch.zeros_like(x)), BROKEN_PROOFS),
        (InputSet, "minimum", no_ball, EXCEEDED_BOUNDS),
    ],
    ids=["intervals", "linear bounds"],
)
def test_an_unsound_bound_fails_the_audit_and_the_run(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, rule: Callable[..., Any], check: str
) -> None:
    monkeypatch.setattr(owner, name, rule)
    result = found(built(MLP([8, 8])), Verification(Bounds.linear, branching=False), eps=0.05)
    assert verdicts(result)[check] == "fail"
    assert result.audit.verdict([Threat(Norm.linf, 0.05)]) == "fail"
    rows = [found.as_dict() for found in result.audit.checks]
    outcome = Outcome([], None, [*uncontradicted("evaluation.verification", rows)])
    assert outcome.content({}, 0, [])["exit_code"] == ExitCode.unmet
    assert any(each.startswith(f"{check} is ") for each in outcome.unmet)


def test_sound_bounds_do_not_fail_the_run() -> None:
    rows = [each.as_dict() for each in found(built(MLP([8, 8]))).audit.checks]
    outcome = Outcome([], None, [*uncontradicted("evaluation.verification", rows)])
    assert len(outcome.requirements) == 2
    assert not outcome.unmet


def test_a_counterexample_that_is_none_does_not_break_an_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(model: nn.Module, x: Tensor, *others: Any, **keys: Any) -> Decision:
        return Decision(Status.counterexample, Reason.none, x.clone(), np.nan, 1, 0.1)

    monkeypatch.setattr(verification, "decide", wrong)
    result = found(built(MLP([8, 8])), Verification(Bounds.intervals), eps=0.05)
    samples = result.ledger.samples()
    assert "branching" not in set(samples["broken_by"])
    undecided = samples.loc[samples["status"] == "undecided", "undecided_because"]
    assert set(undecided) == {NOT_REPEATED}
    assert verdicts(result)[UNREPEATED] == "warn"


def test_a_killed_verification_is_resumed_from_its_pieces(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, chosen, eps = built(MLP([8, 8])), Verification(Bounds.intervals), 0.05
    real, calls = verification.decide, []

    def counted(*args: Any, **keys: Any) -> Decision:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **keys)

    whole = found(model, chosen, eps=eps, attack=NoAttack()).ledger.samples()
    monkeypatch.setattr(verification, "decide", counted)
    with pytest.raises(KeyboardInterrupt):
        found(model, chosen, eps=eps, attack=NoAttack(), folder=tmp_path / "pieces")
    resumed = found(model, chosen, eps=eps, attack=NoAttack(), folder=tmp_path / "pieces")
    again = resumed.ledger.samples()
    searched = int(whole["branching_broken"].notna().sum())
    # The one that was killed began twice.
    assert len(calls) == searched + 1
    times = ["proof_seconds"]
    pd.testing.assert_frame_equal(again.drop(columns=times), whole.drop(columns=times))


def test_settings_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(InputError, match=r"^verify=True is not allowed: it must be false with ver"):
        Evaluation(verify=True, verification=Verification())
    with pytest.raises(InputError, match=r"^verification=\{...\} is not allowed: it must be left "):
        Evaluation(verification=Verification(), certification=Certification())
    for others in ({"seconds": 0}, {"steps": 0}, {"seconds": float("inf")}):
        with pytest.raises(InputError):
            Verification(**others)
