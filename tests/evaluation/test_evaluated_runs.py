"""Evaluations from the command line: killed and started again, and their images scored again."""

import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import robusttrain
from robusttrain.data import as_input
from robusttrain.data.synthetic import Synthetic
from toys.command_line import CommandLine

EPS = 0.1
DATA = ["dataset=synthetic", "dataset.train_size=96", "dataset.test_size=60"]
TRAINING = [*DATA, "dataset.validation=16", "model=linear", "epochs=2", "batch_size=32"]
EVALUATION = [
    "evaluation=standard", "evaluation.samples=50", "evaluation.probe_samples=50",
    "evaluation.batch_size=16", "evaluation.attacks.fab_t.steps=20",
    "evaluation.attacks.square.queries=200", "evaluation.save_adversarial=true",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an evaluation that nobody has interrupted."""
    answer = command_line.run(*TRAINING, *EVALUATION, cwd=tmp_path_factory.mktemp("runs"))
    assert answer.code == 0, answer.said
    return answer.run_dir


def test_a_killed_evaluation_goes_on_and_reports_the_same(
    command_line: CommandLine, trained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    command = ["stages=[evaluate]", f"checkpoint={trained}", *EVALUATION, f"hydra.run.dir={folder}"]
    running = command_line.start(*command, cwd=tmp_path)
    while len(list(folder.glob("evaluation.partial/*.pt"))) < 6:
        assert running.poll() is None, running.said()
        time.sleep(0.002)
    running.signal(signal.SIGKILL).end()
    assert not (folder / "report.csv").exists()

    again = command_line.run(*command, cwd=tmp_path)
    assert again.code == 0, again.said
    for name in ("report.csv", "samples.csv", "audit.csv", "curve.csv"):
        first, second = (
            pd.read_csv(run / name).drop(columns="seconds", errors="ignore")
            for run in (trained, folder)
        )
        pd.testing.assert_frame_equal(first, second, check_exact=True)
    images = [np.load(run / "adversarial.npz")["images"] for run in (trained, folder)]
    assert np.array_equal(*images)
    assert not (folder / "evaluation.partial").exists()
    assert not (trained / "evaluation.partial").exists()


def scored(trained: Path, images: Tensor, labels: Tensor) -> float:
    model = robusttrain.load_model(trained)
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


def test_the_images_that_are_kept_give_the_accuracies_of_the_report(trained: Path) -> None:
    kept = np.load(trained / "adversarial.npz")
    report = pd.read_csv(trained / "report.csv").set_index("attack").to_dict("index")
    images, labels = torch.from_numpy(kept["images"]), torch.from_numpy(kept["label"])
    assert images.dtype == torch.float32
    worst = report["worst_case"]["accuracy"]
    assert scored(trained, images, labels) == pytest.approx(worst, abs=1e-12)
    rounded = (images * 255).round() / 255
    uint8 = report["uint8"]["accuracy"]
    assert scored(trained, rounded, labels) == pytest.approx(uint8, abs=1e-12)
    assert worst < report["clean"]["accuracy"]
    assert (report["uint8"]["eps"], report["uint8"]["n"]) == (EPS, 50)


def test_the_images_that_are_kept_lie_in_the_ball_and_in_the_box(trained: Path) -> None:
    kept = np.load(trained / "adversarial.npz")
    _, test = Synthetic(train_size=96, test_size=60, validation=16).load()
    clean, labels = as_input(test.images)[kept["index"]].numpy(), test.labels[kept["index"]]
    assert np.array_equal(kept["label"], labels)
    assert np.abs(kept["images"] - clean).max() <= EPS + 1e-6
    assert kept["images"].min() >= 0
    assert kept["images"].max() <= 1
    # What the model gets wrong by itself is kept as it was.
    alone = kept["broken_by"] == "clean"
    assert np.array_equal(kept["images"][alone], clean[alone])
    samples = pd.read_csv(trained / "samples.csv", keep_default_na=False)
    assert samples["broken_by"].tolist() == kept["broken_by"].tolist()


NO_ROOM = """
import torch
from robusttrain.evaluation import pipeline

def attack_all(*arguments, **keys):
    raise torch.OutOfMemoryError("CUDA out of memory")

pipeline.attack_all = attack_all
"""


def test_images_that_do_not_fit_into_memory_are_told_of_and_the_model_is_kept(
    command_line: CommandLine, tmp_path: Path
) -> None:
    answer = command_line.run(*TRAINING, "evaluation=quick", cwd=tmp_path, first=NO_ROOM)
    assert answer.code == 1
    assert answer.err == (
        "robusttrain: evaluation.batch_size=128 does not fit into memory: "
        "try evaluation.batch_size=64\n"
    )
    assert len(list(tmp_path.rglob("best.pt"))) == 1
