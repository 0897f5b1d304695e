"""Evaluations from the command line: killed and started again, and their images scored again."""

import os
import signal
import subprocess
import sys
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

EPS = 0.1
DATA = ["dataset=synthetic", "dataset.train_size=96", "dataset.test_size=60"]
TRAINING = [*DATA, "dataset.validation=16", "model=linear", "epochs=2", "batch_size=32"]
EVALUATION = [
    "evaluation=standard", "evaluation.samples=50", "evaluation.probe_samples=50",
    "evaluation.batch_size=16", "evaluation.attacks.fab_t.steps=20",
    "evaluation.attacks.square.queries=200", "evaluation.save_adversarial=true",
]  # fmt: skip


def started(*arguments: str, folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "robusttrain", *arguments, f"hydra.run.dir={folder}"],
        cwd=folder.parent, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]") -> None:
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an evaluation that nobody has interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    finish(started(*TRAINING, *EVALUATION, folder=folder))
    return folder


def test_a_killed_evaluation_goes_on_and_reports_the_same(trained: Path) -> None:
    folder = trained.parent / "killed"
    command = ["stages=[evaluate]", f"checkpoint={trained}", *EVALUATION]
    process = started(*command, folder=folder)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("evaluation.partial/*.pt"))) < 6 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(list(folder.glob("evaluation.partial/*.pt"))) >= 6
    assert not (folder / "report.csv").exists()

    finish(started(*command, folder=folder))
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
