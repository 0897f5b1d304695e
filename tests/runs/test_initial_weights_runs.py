"""Runs with `model.weights`: what they need the file for, and what they write about it."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from robusttrain.checkpoints.checkpoint import load
from robusttrain.errors import InputError
from robusttrain.models.mlp import MLP
from robusttrain.report.terminal import Terminal
from robusttrain.runs import experiment
from robusttrain.runs.rerun import Repetition
from robusttrain.runs.saved_model import load_model
from toys.external import CLASSES, SHAPE, TINY, Answer, images, looked_at, prepared

SHORT = [
    *TINY, "model=mlp", "model.widths=[8]", "evaluation.audit=false", "evaluation.samples=4",
    "evaluation.attacks={}", "+attack@evaluation.attacks.near=fgsm", "defense=standard",
]  # fmt: skip


def theirs() -> nn.Module:
    torch.manual_seed(7)
    return MLP(widths=[8]).build(CLASSES, SHAPE)


class Run:
    """A run that started with a file, which was removed afterwards."""

    def __init__(self, folder: Path) -> None:
        self.file, self.folder = folder / "theirs.pt", folder / "run"
        torch.save(theirs().state_dict(), self.file)
        self.digest = hashlib.sha256(self.file.read_bytes()).hexdigest()
        self.words = [
            *SHORT,
            f"model.weights={self.file}",
            "training.keep=last",
            "optimizer.lr=1e-30",
        ]
        self.answer = Answer(self.folder, *self.words)
        self.file.rename(folder / "moved.pt")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("weights"))


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def test_a_training_starts_with_the_weights(run: Run) -> None:
    # The learning rate was too low to change them.
    assert torch.equal(load_model(run.folder)(images()), theirs()(images()))
    assert f"model.weights={run.file}: 4 tensors" in run.answer.said


def test_the_manifest_has_the_file_and_its_digest(run: Run) -> None:
    assert manifest(run.folder)["weights"] == {"path": str(run.file), "sha256": run.digest}


def test_the_checkpoint_of_the_run_needs_no_file(run: Run, tmp_path: Path) -> None:
    evaluated = Answer(tmp_path / "a", *SHORT, f"checkpoint={run.folder}", "stages=[evaluate]")
    assert evaluated.accuracy("clean") == run.answer.accuracy("clean")
    assert manifest(tmp_path / "a")["weights"] is None
    words = [word for word in SHORT if word != "defense=standard"]
    teacher = ["defense=distill", f"defense.teacher={run.folder}", f"checkpoint={run.folder}"]
    Answer(tmp_path / "b", *words, *teacher, "stages=[train]")


def test_a_resumed_run_needs_no_file_and_keeps_its_digest(run: Run) -> None:
    before = manifest(run.folder)["weights"]
    (run.folder / "manifest.json").unlink()
    built, origin = prepared(*run.words, f"resume={run.folder}")
    experiment.run(built, origin, run.folder, Terminal(Console(file=io.StringIO())))
    assert manifest(run.folder)["weights"] == before


def test_a_repetition_needs_the_file_as_it_was(run: Run, tmp_path: Path) -> None:
    changed = manifest(run.folder) | {"overrides": run.words}
    (run.folder / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(InputError, match=r"theirs\.pt is not there"):
        Repetition.of([str(run.folder)])
    torch.save(theirs().double().state_dict(), run.file)
    with pytest.raises(InputError, match=r"started with other weights: .*has changed since"):
        Repetition.of([str(run.folder)])
    run.file.with_name("moved.pt").rename(run.file)
    assert Repetition.of([str(run.folder)]).words == tuple(run.words)
    run.file.rename(run.file.with_name("moved.pt"))


def test_an_evaluation_alone_is_that_of_the_checkpoint(run: Run, tmp_path: Path) -> None:
    words = [*SHORT, "stages=[evaluate]", f"model.weights={run.file.with_name('moved.pt')}"]
    given = Answer(tmp_path / "run", *words)
    assert given.accuracy("clean") == run.answer.accuracy("clean")
    assert given.labels == ("mlp", "standard")


def test_an_evaluation_of_a_run_describes_its_training(run: Run) -> None:
    words = [word for word in SHORT if word != "defense=standard"]
    origin = looked_at(*words, "stages=[evaluate]", f"model.weights={run.folder}").origin
    assert origin.names["defense"] == "standard"
    assert origin.trained is not None
    assert origin.trained["epochs"] == 1


def test_the_path_may_be_relative(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.file.parent)
    built, _ = prepared(*SHORT, "model.weights=moved.pt")
    assert built.initial_weights.read([]) is not None
    provenance = built.initial_weights.provenance()
    assert provenance == {"path": str(run.file.with_name("moved.pt")), "sha256": run.digest}


def test_a_run_with_noise_and_one_without_both_start_a_noisy_one(run: Run, tmp_path: Path) -> None:
    noisy = [*SHORT, "stages=[train]", "noise=pni_w", "optimizer.lr=1e-30"]
    Answer(tmp_path / "a", *noisy, f"model.weights={run.folder}")
    Answer(tmp_path / "b", *noisy, f"model.weights={tmp_path / 'a'}", "seed=1")
    one, other = (load(tmp_path / name).model for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_weights_and_a_checkpoint_are_refused_together(run: Run) -> None:
    with pytest.raises(InputError, match=r"^model\.weights=.*leave one out"):
        looked_at(*SHORT, f"checkpoint={run.folder}", f"model.weights={run.folder}")


# --- a user's own network ------------------------------------------------------------------------


class Theirs(nn.Module):
    """A network whose inputs are normalised outside, and that returns more than its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        logits: Tensor = self.fc(x.flatten(1))
        return {"loss": None, "logits": logits}


def test_the_keys_are_those_of_a_users_own_network_too(tmp_path: Path) -> None:
    torch.manual_seed(7)
    theirs = Theirs()
    torch.save({"net": theirs.state_dict()}, tmp_path / "own.pt")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "own.yaml").write_text(f"_target_: {__name__}.Theirs\n")
    words = [
        *(word for word in SHORT if not word.startswith("model")), "optimizer.lr=1e-30",
        f"hydra.searchpath=[file://{tmp_path}]", "model=own", "model.mean=[0.4]",
        "model.std=[0.2]", f"model.weights={tmp_path / 'own.pt'}",
    ]  # fmt: skip
    Answer(tmp_path / "run", *words)
    model = load_model(tmp_path / "run", trust=[__name__.partition(".")[0]])
    expected = theirs((images() - 0.4) / 0.2)["logits"]
    assert torch.equal(model(images()), expected)


def test_a_normalisation_needs_both_statistics() -> None:
    with pytest.raises(InputError, match=r"^model\.mean=\[0\.5\].*given together with std"):
        looked_at(*SHORT, "model.mean=[0.5]")
