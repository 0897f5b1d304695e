"""What bounds prove of a model whose robust accuracy is known, and what attacks must not break."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robusttrain.bounds.intervals import refuse_unbounded
from robusttrain.errors import InputError
from robusttrain.evaluation.findings import Verdict
from robusttrain.evaluation.session import EvaluationSession
from robusttrain.evaluation.settings import Bounds, Certification, Evaluation, Verification
from robusttrain.evaluation.verification import verify
from robusttrain.noise.gaussian import Gaussian
from robusttrain.report.ledger import Ledger, Outcome
from robusttrain.report.proofs import BROKEN_PROOFS
from robusttrain.threat import Norm, Threat
from toys.command_line import CommandLine

PIXELS = torch.tensor([0.0, 0.3, 0.45, 0.55, 0.7, 1.0, 0.9, 0.1])
LABELS = torch.tensor([0, 0, 0, 1, 1, 1, 0, 1])
RIGHT = [True, True, True, True, True, True, False, False]


class Threshold(nn.Module):
    """Class 1 where the one pixel is above 1/2."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(1), nn.Linear(1, 2))
        with torch.no_grad():
            self.layers[1].weight.copy_(torch.tensor([[-4.0], [4.0]]))
            self.layers[1].bias.copy_(torch.tensor([2.0, -2.0]))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


def subject(model: nn.Module, batch_size: int = 3) -> EvaluationSession:
    x = PIXELS.view(-1, 1, 1, 1)
    return EvaluationSession(model.eval(), x, LABELS, batch_size, eot=2, votes=2, seed=0)


def proven(session: EvaluationSession, eps: float) -> NDArray[np.bool_]:
    """What intervals prove of images that no attack has broken."""
    found = ledger([False] * 8, eps)
    verify(session, found, Verification(Bounds.intervals, branching=False), Threat(Norm.linf, eps))
    assert found.proofs is not None
    return found.proofs.proven


@pytest.mark.parametrize(
    ("eps", "held"),
    [
        (0.0, RIGHT),
        (0.1, [True, True, False, False, True, True, False, False]),
        (0.3, [True, False, False, False, False, True, False, False]),
        (0.6, [False] * 8),
    ],
)
def test_what_is_proven_of_a_threshold_is_what_is_true(eps: float, held: list[bool]) -> None:
    assert proven(subject(Threshold()), eps).tolist() == held


def test_batches_change_nothing() -> None:
    for size in (1, 8, 100):
        held = proven(subject(Threshold(), size), 0.1)
        assert np.array_equal(held, proven(subject(Threshold()), 0.1))


def test_a_tie_proves_nothing() -> None:
    flat = nn.Sequential(nn.Flatten(1), nn.Linear(1, 2))
    nn.init.zeros_(flat[1].weight)
    nn.init.zeros_(flat[1].bias)
    assert not proven(subject(flat), 0.0).any()


class Trembling(Threshold):
    """Noise that nobody has declared, of which a bound would be that of one draw."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.01 * torch.randn(x.shape))


def test_of_a_model_that_draws_noise_nothing_is_proven() -> None:
    assert not proven(subject(Trembling()), 0.0).any()


def ledger(broken: list[bool], eps: float, norm: Norm = Norm.linf) -> Ledger:
    """Margins are infinite, so that only the flags contradict a proof."""
    flags, margin = np.array(broken), np.full(8, np.inf)
    prediction = np.where(RIGHT, LABELS, 1 - LABELS)
    attacked = Outcome(Threat(norm, eps), flags, margin, np.zeros(8), 0.0)
    return Ledger(np.arange(8), LABELS.numpy(), prediction, margin, 0.0, {"pgd": attacked})


@pytest.mark.parametrize(
    ("broken", "norm", "eps", "verdict"),
    [
        ([False, True, True, False, True, False, True, True], Norm.linf, 0.3, Verdict.passed),
        ([True, True, True, False, True, False, True, True], Norm.linf, 0.3, Verdict.failed),
        ([True, True, True, False, True, False, True, True], Norm.linf, 0.1, Verdict.failed),
        # What an attack with more room breaks says nothing against the proof.
        ([True, True, True, False, True, False, True, True], Norm.linf, 0.5, Verdict.passed),
        ([True, True, True, False, True, False, True, True], Norm.l2, 0.5, Verdict.passed),
        # In the l2 ball, there is less room than in the linf ball of the same radius.
        ([True, True, True, False, True, False, True, True], Norm.l2, 0.3, Verdict.failed),
    ],
)
def test_an_attack_that_breaks_what_is_proven_fails_the_audit(
    broken: list[bool], norm: Norm, eps: float, verdict: Verdict
) -> None:
    by_intervals = Verification(Bounds.intervals, branching=False)
    threat = Threat(Norm.linf, 0.3)
    found = verify(subject(Threshold()), ledger(broken, eps, norm), by_intervals, threat)
    (check,) = (each for each in found.checks if each.check == BROKEN_PROOFS)
    assert check.verdict is verdict
    assert check.figure == (verdict is Verdict.failed)
    (row,) = (each for each in found.controls if each.attack == "verified")
    assert (row.threat, row.n, row.accuracy) == (threat, 8, 0.25)


def test_other_norms_noise_and_unknown_layers_are_refused() -> None:
    shape = (1, 1, 1)
    refuse_unbounded(Threshold(), shape, Norm.linf, "this")
    with pytest.raises(InputError, match=r"^norm=l2 is not allowed: it must be linf with this"):
        refuse_unbounded(Threshold(), shape, Norm.l2, "this")
    noisy = Threshold()
    Gaussian(0.1, predict=True).install(noisy, 0)
    with pytest.raises(InputError, match=r"^noise.predict=True is not .* false with this"):
        refuse_unbounded(noisy, shape, Norm.linf, "this")
    with pytest.raises(InputError, match=r"^this cannot be used with this model.*through softmax"):
        refuse_unbounded(nn.Sequential(Threshold(), nn.Softmax(1)), shape, Norm.linf, "this")


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_program_is_refused() -> None:
    program = torch.jit.trace(Threshold(), torch.zeros(1, 1, 1, 1))  # type: ignore[no-untyped-call]
    with pytest.raises(InputError, match="not through ScriptMethod"):
        refuse_unbounded(program, (1, 1, 1), Norm.linf, "this")


def test_certificates_of_noisy_votes_are_no_proofs_of_this_kind() -> None:
    with pytest.raises(InputError, match=r"^verify=True is not allowed: it must be false with"):
        Evaluation(verify=True, certification=Certification())


def test_a_run_reports_what_it_proves(command_line: CommandLine, tmp_path: Path) -> None:
    data = ["dataset=synthetic", "dataset.train_size=96", "dataset.test_size=60"]
    training = ["dataset.validation=16", "model=linear", "defense=ibp", "eps=0.01", "epochs=3"]
    evaluation = ["evaluation=quick", "evaluation.verify=true", "evaluation.probe_samples=20"]
    answer = command_line.run(*data, *training, *evaluation, cwd=tmp_path)
    assert answer.code == 0, answer.said
    report = pd.read_csv(answer.run_dir / "report.csv").set_index("attack")
    samples = pd.read_csv(answer.run_dir / "samples.csv")
    audit = pd.read_csv(answer.run_dir / "audit.csv").set_index("check")
    assert report.loc["verified", "accuracy"] == pytest.approx(samples["proven"].mean(), abs=1e-6)
    assert 0 < report.loc["verified", "accuracy"] <= report.loc["worst_case", "accuracy"]
    # Of a linear model bounds prove all there is, and PGD finds the rest.
    assert report.loc["verified", "accuracy"] == report.loc["worst_case", "accuracy"]
    assert audit.loc["proven images broken by an attack", "verdict"] == "pass"
    assert set(samples["status"]) <= {"wrong", "broken", "proven"}
    assert "images: " in answer.said
    assert " proven by intervals, 0 proven by linear bounds, " in answer.said


def test_it_is_refused_before_training(command_line: CommandLine, tmp_path: Path) -> None:
    for override in ("evaluation.verify=true", "defense=ibp"):
        answer = command_line.run("experiment=smoke", override, "norm=l2", cwd=tmp_path)
        assert answer.code == 1
        assert answer.said.startswith("robusttrain: norm=l2 is not allowed: it must be linf with")
        assert not list(tmp_path.rglob("train.csv"))


def test_what_was_trained_on_bounds_is_evaluated_in_other_norms(
    command_line: CommandLine, tmp_path: Path
) -> None:
    trained = command_line.run("experiment=smoke", "defense=ibp", "stages=[train]", cwd=tmp_path)
    assert trained.code == 0, trained.said
    answer = command_line.run(
        "stages=[evaluate]", f"checkpoint={trained.run_dir}", "norm=l2", "evaluation=quick",
        cwd=tmp_path,
    )  # fmt: skip
    assert answer.code == 0, answer.said
