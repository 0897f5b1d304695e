"""Whole evaluations of foreign models: their reports, and warnings about the models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks.attack_loss import cross_entropy
from robusttrain.data import as_input
from robusttrain.errors import InputError
from robusttrain.models.mlp import MLP
from robusttrain.runs.saved_model import load_model
from toys.external import (
    CLASSES,
    SHAPE,
    TINY,
    Answer,
    Write,
    clean_accuracy,
    exported,
    prepared,
    scripted,
    synthetic,
    written,
)

# Programs run their own code.
CONSENT = "trust=[code]"
EVALUATE_MLP = [*TINY, "model=mlp", "model.widths=[32]", "stages=[evaluate]"]

# A short evaluation, for tests that only read warnings or labels.
BRIEFLY = [
    "evaluation.audit=false", "~evaluation.attacks.uniform", "~evaluation.attacks.pgd",
    "~evaluation.attacks.apgd_ce",
]  # fmt: skip


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    """A network that learned the synthetic problem outside robusttrain."""
    train, _ = synthetic(train_size=500).load()
    torch.manual_seed(0)
    network = MLP([32]).build(CLASSES, SHAPE)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        cross_entropy(network(as_input(train.images)), train.labels).mean().backward()
        optimizer.step()
    assert clean_accuracy(network) > 0.9
    return network.eval()


@pytest.fixture(scope="module")
def path(theirs: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its state dict, as saved by a script with DataParallel."""
    path = tmp_path_factory.mktemp("theirs") / "theirs.pt"
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, path)
    return path


@pytest.fixture(scope="module")
def answer(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    return Answer(tmp_path_factory.mktemp("runs") / "run", *EVALUATE_MLP, f"checkpoint={path}")


def test_a_foreign_state_dict_is_evaluated(theirs: nn.Module, path: Path, answer: Answer) -> None:
    assert answer.accuracy("clean") == pytest.approx(clean_accuracy(theirs), abs=1e-6)
    assert answer.accuracy("pgd") < answer.accuracy("clean")
    assert answer.labels == ("mlp", "foreign")
    assert answer.said.startswith(f"checkpoint={path} is a state dict of 4 tensors\n")
    assert "warning" not in answer.said


def test_the_user_may_know_how_it_was_trained(path: Path, tmp_path: Path) -> None:
    known = [f"checkpoint={path}", "defense=standard"]
    answer = Answer(tmp_path / "run", *EVALUATE_MLP, *BRIEFLY, *known)
    assert answer.labels == ("mlp", "standard")


def test_the_command_line_describes_the_run_of_a_foreign_model(path: Path) -> None:
    overrides = ["eps=0.07", "norm=l2", "seed=4"]
    config, origin = prepared(*EVALUATE_MLP, f"checkpoint={path}", *overrides)
    assert (config.eps, config.norm, config.seed) == (0.07, "l2", 4)
    assert origin.names["dataset"] == "synthetic"


def test_a_foreign_state_dict_is_trained_further(
    theirs: nn.Module, path: Path, tmp_path: Path
) -> None:
    further = ["stages=[train]", "optimizer.lr=1e-9"]
    answer = Answer(tmp_path / "run", *EVALUATE_MLP, f"checkpoint={path}", *further)
    assert answer.origin.names["defense"] == "madry"
    trained_further = load_model(tmp_path / "run").state_dict()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(trained_further[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("write", [scripted, exported])
def test_a_program_is_evaluated_like_its_source(
    theirs: nn.Module, answer: Answer, tmp_path: Path, write: Write
) -> None:
    file = written(write, theirs, tmp_path / "net.file")
    program = Answer(tmp_path / "run", *EVALUATE_MLP, f"checkpoint={file}", CONSENT)
    assert program.labels == ("net", "foreign")
    assert f"checkpoint={file} is a program of" in program.said
    for attack in ("clean", "fgsm", "pgd", "worst_case"):
        assert program.accuracy(attack) == pytest.approx(answer.accuracy(attack), abs=0.026)


def test_a_program_is_not_trained(theirs: nn.Module, tmp_path: Path) -> None:
    path = written(scripted, theirs, tmp_path / "net.ts")
    with pytest.raises(InputError, match=r"net\.ts is a program.*stages=\[evaluate\]"):
        Answer(tmp_path / "run", *TINY, f"checkpoint={path}", CONSENT)


def test_few_images_still_show_what_was_assumed(theirs: nn.Module, tmp_path: Path) -> None:
    """Too few to prove a wrong normalisation; the line has both accuracies."""
    outside = Outside(theirs).eval()
    path = written(scripted, outside, tmp_path / "net.pt")
    answer = Answer(tmp_path / "run", *EVALUATE_MLP, *BRIEFLY, f"checkpoint={path}", CONSENT)
    assert "warning" not in answer.said
    (line,) = (line for line in answer.said.splitlines() if "is assumed to take" in line)
    assert f"is {clean_accuracy(outside):.1%} of 40 images, and would be " in line
    alternative = float(line.partition("would be ")[2].partition("%")[0]) / 100
    assert alternative >= clean_accuracy(theirs) > clean_accuracy(outside)


class Outside(nn.Module):
    """A network that expects centred images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.network(z * 0.5 + 0.5)
        return logits


def in_train_mode(model: nn.Module, path: Path) -> None:
    exported(nn.Sequential(model, nn.Dropout(0.5)).train(), path)


@pytest.mark.parametrize(
    ("wrap", "write", "said"),
    [
        (lambda net: nn.Sequential(net, nn.Softmax(1)), exported, "leave out the softmax"),
        (lambda net: nn.Sequential(net, nn.Softmax(1)), scripted, "leave out the softmax"),
        (lambda net: net, in_train_mode, "dropout is active"),
        (Outside, exported, "wrap it"),
        (lambda net: net, exported, ""),
    ],
    ids=["softmax exported", "softmax scripted", "train mode", "normalisation", "sound"],
)
def test_warnings_about_a_model_precede_the_report(
    theirs: nn.Module,
    tmp_path: Path,
    wrap: Callable[[nn.Module], nn.Module],
    write: Write,
    said: str,
) -> None:
    path = written(write, wrap(theirs).eval(), tmp_path / "net.pt2")
    looked_at = ["dataset.test_size=200", f"checkpoint={path}", CONSENT]
    answer = Answer(tmp_path / "run", *EVALUATE_MLP, *BRIEFLY, *looked_at)
    warned = [line for line in answer.said.splitlines() if line.startswith("warning: ")]
    assert len(warned) == bool(said), answer.said
    assert said in "".join(warned)
