"""A dry run counts the passes that the run makes, and writes nothing."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from robusttrain.attacks.pgd import PGD
from robusttrain.data import Info
from robusttrain.runs import dry_run
from robusttrain.runs.dry_run import robust_network
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball
from toys.command_line import CommandLine
from toys.runs import finished, listing

WORDS = [
    "dataset=synthetic", "dataset.train_size=64", "dataset.test_size=30", "dataset.validation=16",
    "model=linear", "epochs=2", "batch_size=20", "device=cpu", "eps=0.01", "evaluation=quick",
    "evaluation.samples=20", "evaluation.probe_samples=10", "attack.steps=3",
]  # fmt: skip


def estimates(said: str) -> dict[str, float]:
    """The passes an image of each stage."""
    table = re.findall(
        r"^ *(training|evaluation) .+?  +(?:at most )?([\d,]+)  +(?:at most )?\d+\.\d  +[\d,]+ *$",
        said,
        re.M,
    )
    return {stage: float(passes.replace(",", "")) for stage, passes in table}


@pytest.mark.parametrize(
    ("words", "passes"),
    [
        (["defense=standard"], 2),
        (["defense=madry"], 2 * 3 + 2),
        (["defense=madry", "training.curriculum.steps=[1,3]"], 2 * 3 + 2),
        (["defense=fgsm_rs"], 4),
        (["defense=free", "defense.replays=4"], 2 * 4),
    ],
)
def test_the_passes_of_a_training_are_those_of_its_last_epoch(
    words: list[str], passes: float, command_line: CommandLine, tmp_path: Path
) -> None:
    given = [word for word in WORDS if "steps" not in word or "defense=madry" in words]
    answer = command_line.run(*given, *words, "stages=[train]", "--dry-run", cwd=tmp_path)
    assert answer.code == 0, answer.said
    assert estimates(answer.said) == {"training": passes}
    assert listing(tmp_path) == []


def test_a_run_makes_the_passes_of_its_estimate(command_line: CommandLine, tmp_path: Path) -> None:
    """An evaluation makes fewer, since some images break, but for a look at the model before."""
    estimate = estimates(command_line.run("--dry-run", *WORDS, cwd=tmp_path).said)
    assert listing(tmp_path) == []
    finished(command_line.start(*WORDS, "hydra.run.dir=run", cwd=tmp_path))
    cost = json.loads((tmp_path / "run/manifest.json").read_text())["cost"]
    assert cost["training"]["passes"] == 2 * 48 * estimate["training"]
    assert 0.3 < cost["evaluation"]["passes"] / (20 * estimate["evaluation"]) < 1.1


def test_both_attacks_after_an_epoch_count_also_on_as_many_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An image takes a minute here, and each attack has 32 of them."""
    monkeypatch.setattr(dry_run, "_work", lambda *_: dry_run._Work(1, 0, 0))
    monkeypatch.setattr(dry_run, "_speed", lambda *_: dry_run._Speed(60, 0, 1))
    settings = SimpleNamespace(batch_size=16, validation_attack=PGD(eps=0.1))
    some = SimpleNamespace(size=32)
    trainer: Any = SimpleNamespace(
        model=None, settings=settings, threat=Threat(Norm.linf, 0.1), validation=some,
        probe_images=some, validate=SimpleNamespace(searches=lambda name, one: {name: one}),
    )  # fmt: skip
    context: Any = SimpleNamespace(info=None, device=None)
    assert dry_run._validation(context, trainer) == pytest.approx(2 * 32)


def test_a_training_of_no_epochs_takes_no_time(command_line: CommandLine, tmp_path: Path) -> None:
    words = ["epochs=0", "stages=[train]", "training.curriculum.steps=[1,3]", "--dry-run"]
    answer = command_line.run(*WORDS, *words, cwd=tmp_path)
    assert answer.code == 0, answer.said
    assert " 0.0 " in answer.said


@pytest.mark.parametrize("words", [["-m", "seed=0,1"], ["resume=auto"]])
def test_it_is_one_of_a_new_run(
    words: list[str], command_line: CommandLine, tmp_path: Path
) -> None:
    answer = command_line.run(*WORDS, *words, "--dry-run", cwd=tmp_path)
    assert answer.code == 1
    assert f"--dry-run does not go together with {words[0]}" in answer.err
    assert listing(tmp_path) == []


@pytest.mark.parametrize("norm", list(Norm))
def test_the_network_of_the_count_is_robust_just_beyond_the_radius(norm: Norm) -> None:
    network = robust_network([Threat(norm, 0.1)], Info((1, 4, 4), 3, ("a", "b", "c")))
    grey = torch.full((1, 1, 4, 4), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(grey)[0, 2], grey)
    for radius, kept in ((0.11, True), (0.13, False)):
        moved = ball(Threat(norm, radius)).linear_maximiser(gradient, grey.detach())
        assert bool(network(moved).argmax() == 0) is kept


def test_the_network_of_the_count_is_robust_in_all_threat_models_of_a_run() -> None:
    threats = [Threat(Norm.linf, 0.1), Threat(Norm.l2, 0.3), Threat(Norm.l1, 0.5)]
    network = robust_network(threats, Info((1, 4, 4), 3, ("a", "b", "c")))
    grey = torch.full((1, 1, 4, 4), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(grey)[0, 2], grey)
    for threat in threats:
        moved = ball(threat).linear_maximiser(gradient, grey.detach())
        assert network(moved).argmax() == 0
