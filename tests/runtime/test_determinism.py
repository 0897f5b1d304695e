"""Repeated runs: with deterministic algorithms, and with different displays and evaluations."""

import io
import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.pgd import PGD
from robusttrain.checkpoints import checkpoint
from robusttrain.config.run_config import Config, Stage
from robusttrain.defenses import Defense, Objective
from robusttrain.defenses.standard import Standard
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.errors import InputError
from robusttrain.evaluation import Evaluation
from robusttrain.loggers.none import NoLogger
from robusttrain.models.mlp import MLP
from robusttrain.noise.gaussian import Gaussian
from robusttrain.optim.averaging import NoAveraging
from robusttrain.optim.optimizers import SGD
from robusttrain.optim.schedules import Constant
from robusttrain.optim.weight_perturbation import NoPerturbation
from robusttrain.report import terminal
from robusttrain.report.terminal import Terminal
from robusttrain.runs import experiment
from robusttrain.runs.context import Origin
from robusttrain.runtime.determinism import WORKSPACE, deterministic, flags
from robusttrain.training.settings import Keep, Training
from toys.training import DATA, EPS

DEFAULT = {
    "algorithms": False, "cudnn_deterministic": False, "cudnn_benchmark": False, WORKSPACE: None,
}  # fmt: skip
CHANGED = {
    "algorithms": True, "cudnn_deterministic": True, "cudnn_benchmark": False, WORKSPACE: ":4096:8",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)


def run(
    folder: Path,
    defense: Defense | None = None,
    *,
    stages: tuple[Stage, ...] = (Stage.train,),
    shown: bool = False,
    **keys: Any,
) -> dict[str, Tensor]:
    """The weights of a small run in which every component draws random numbers."""
    folder.mkdir()
    config = Config(
        dataset=replace(DATA, crop=1, flip=True), model=MLP([8]), noise=Gaussian(0.2),
        attack=FGSM(eps=EPS), defense=defense or WorstCase(PGD(eps=EPS, steps=2)),
        optimizer=SGD(0.5), schedule=Constant(),
        weight_perturbation=NoPerturbation(), averaging=NoAveraging(),
        training=Training(
            epochs=3, batch_size=20, validation_attack=FGSM(eps=EPS), keep=Keep.last
        ),
        evaluation=Evaluation({"pgd": PGD(eps=EPS, restarts=2)}, eot=2, votes=5),
        logger=NoLogger(), eps=EPS, device="cpu", stages=list(stages), **keys,
    )  # fmt: skip
    origin = Origin({}, dict.fromkeys(("dataset", "model", "defense", "noise"), "x"))
    console = Console(file=io.StringIO(), force_terminal=shown, width=200)
    experiment.run(config, origin, folder, Terminal(console))
    assert not shown or "epoch 2/3" in console.file.getvalue()  # type: ignore[attr-defined]
    return checkpoint.load(folder / "checkpoint.pt").model


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@dataclass
class Noting(Standard):
    """Standard training that records the switches."""

    seen: list[dict[str, Any]]

    def outer(self, *arguments: Any, **keys: Any) -> Objective:
        self.seen.append(flags())
        return super().outer(*arguments, **keys)


@pytest.mark.parametrize(("wanted", "expected"), [(False, DEFAULT), (True, CHANGED)])
def test_the_switches_are_on_in_a_run_and_recorded_and_restored(
    wanted: bool, expected: dict[str, Any], tmp_path: Path
) -> None:
    noting = Noting([])
    run(tmp_path / "run", noting, deterministic=wanted)
    # The first step is a rehearsal, which has no part in the results.
    assert noting.seen[1:] == [expected] * (len(noting.seen) - 1)
    assert json.loads((tmp_path / "run/manifest.json").read_text())["determinism"] == expected
    assert flags() == DEFAULT


def test_settings_of_the_user_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":16:8")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = flags()
        with deterministic(True):
            assert flags() == {**CHANGED, WORKSPACE: ":16:8"}
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert flags() == before
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert os.environ[WORKSPACE] == ":16:8"


@dataclass
class Unordered(Standard):
    """An operation that writes to the same place twice, in an undefined order."""

    def inner(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Tensor:
        return x.put_(torch.zeros(2).long(), torch.rand(2))


def test_an_operation_without_a_deterministic_form_is_named(tmp_path: Path) -> None:
    message = "^deterministic=true is not possible: put_ has no deterministic form on this device$"
    with pytest.raises(InputError, match=message):
        run(tmp_path / "run", Unordered(), deterministic=True)
    assert flags() == DEFAULT
    run(tmp_path / "free", Unordered())


def test_other_errors_are_not_changed() -> None:
    with pytest.raises(RuntimeError, match="shapes"), deterministic(True):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert flags() == DEFAULT


def test_a_run_does_not_depend_on_evaluation_display_and_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights = run(tmp_path / "first")
    assert same(run(tmp_path / "again"), weights)
    assert same(run(tmp_path / "deterministic", deterministic=True), weights)
    # With an evaluated test set, a display that is refreshed all the time, and a full log.
    assert same(run(tmp_path / "evaluated", stages=(Stage.train, Stage.evaluate)), weights)
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_UPDATES", 0)
    with caplog.at_level(logging.DEBUG):
        assert same(run(tmp_path / "shown", shown=True), weights)
    assert not same(run(tmp_path / "other", seed=1), weights)
