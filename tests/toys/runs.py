"""Whole runs: a short one, and what it may leave."""

import csv
import json
from pathlib import Path

import torch

from robusttrain.checkpoints import checkpoint as checkpoints
from robusttrain.report.identity import digests
from toys.command_line import Answer, Running


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def rows(path: Path) -> list[dict[str, str]]:
    """A table without what the clock says."""
    with path.open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


# Every stream that a run can draw from is in use: augmentation, attack, noise and votes.
RUN = [
    "defense=alpha_mix", "attack=pgd", "attack.steps=2", "noise=gaussian", "noise.predict=true",
    "dataset=synthetic", "model=mlp", "dataset.crop=1", "dataset.flip=true", "epochs=3",
    "batch_size=64", "evaluation=quick", "evaluation.samples=40", "evaluation.audit=false",
    "evaluation.attacks.pgd.steps=3", "evaluation.attacks.apgd_ce.steps=5",
    "evaluation.eot=2", "evaluation.votes=5", "training.checkpoint_minutes=0.0001",
    # The state after the last epoch has to be the same, too.
    "training.keep=last",
    "optimizer=sgd", "device=cpu",
]  # fmt: skip


def finished(running: Running) -> Answer:
    answer = running.end()
    assert answer.code == 0, answer.said
    return answer


def refused(running: Running) -> str:
    """What is said, which is no traceback."""
    answer = running.end()
    assert answer.code == 1, answer.said
    assert "Traceback" not in answer.said
    return answer.said


def with_manifest(run: Path, **changes: object) -> Path:
    """The run with another manifest; an entry that is None is left out."""
    path = run / "manifest.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return run


def as_written(run: Path) -> Path:
    """The run with a manifest of its files as they are now, as if it had written them."""
    return with_manifest(run, files=digests(run))


def same(one: Path, other: Path) -> None:
    for name in ("train.csv", "report.csv", "samples.csv"):
        assert rows(one / name) == rows(other / name), name
    assert training_passes(one) == training_passes(other)
    for name in ("best.pt", "checkpoint.pt"):
        ours, theirs = (checkpoints.load(run / name) for run in (one, other))
        assert ours.model.keys() == theirs.model.keys()
        assert all(torch.equal(ours.model[key], theirs.model[key]) for key in ours.model), name
    assert not list(one.glob(".*partial")) + list(one.glob(".lock"))


def training_passes(run: Path) -> int:
    cost: dict[str, dict[str, int]] = json.loads((run / "manifest.json").read_text())["cost"]
    return cost["training"]["passes"]


Answers = dict[str, Answer]


# A set of data that is loaded says so.
SAYS_LOADED = """
from robusttrain.data.synthetic import Synthetic
load = Synthetic.load
Synthetic.load = lambda self: print("LOADED") or load(self)
"""


def assert_refused(answer: Answer, names: list[str]) -> None:
    assert answer.code in (1, 2)
    message = answer.err.strip()
    assert message.startswith("robusttrain: ")
    assert "Traceback" not in answer.err
    assert len(message.splitlines()) <= 2, message
    for name in names:
        assert name in message, message
    assert listing(answer.cwd) == []
