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


# --- several threat models, and a suite that is weaker than its probe ----------------------------


@pytest.fixture(scope="module")
def several(command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose suite has attacks of two norms and two radii."""
    place = tmp_path_factory.mktemp("several")
    more = [
        "+attack@evaluation.attacks.x=pgd", "evaluation.attacks.x.norm=l2",
        "evaluation.attacks.x.eps=0.3", "+attack@evaluation.attacks.far=pgd",
        "evaluation.attacks.far.eps=0.2", "evaluation.save_adversarial=true",
    ]  # fmt: skip
    words = ["model=mlp", "epochs=2", "evaluation=quick", "evaluation.samples=60", "eps=0.1"]
    answer = command_line.run(*words, *more, "device=cpu", "hydra.run.dir=run", cwd=place)
    assert answer.code == 0, answer.said
    return place / "run"


def test_each_threat_model_has_its_own_worst_case(several: Path) -> None:
    report = pd.read_csv(several / "report.csv", keep_default_na=False)
    keys = ["attack", "norm", "eps"]
    assert not report.duplicated(keys).any()
    last = report.iloc[-4:]
    assert last[keys].to_numpy().tolist() == [
        ["worst_case", "linf", "0.1"], ["worst_case", "l2", "0.3"], ["worst_case", "linf", "0.2"],
        ["union", "", ""],
    ]  # fmt: skip
    samples = pd.read_csv(several / "samples.csv")
    right = samples["clean_prediction"] == samples["label"]
    within = {
        ("linf", "0.1"): ["uniform", "fgsm", "pgd", "apgd_ce", "probe"],
        ("l2", "0.3"): ["x"],
        ("linf", "0.2"): ["uniform", "fgsm", "pgd", "apgd_ce", "probe", "far"],
        ("", ""): ["uniform", "fgsm", "pgd", "apgd_ce", "probe", "far", "x"],
    }
    for row in last.to_dict("records"):
        attacks = within[row["norm"], row["eps"]]
        left = right & ~(samples[[f"{attack}_broken" for attack in attacks]] == 1).any(axis=1)
        assert row["accuracy"] == pytest.approx(left.mean(), abs=1e-6)
    audit = pd.read_csv(several / "audit.csv").set_index("check")
    assert audit.loc["suite breaks more than the probe by", "figure"] < 10
    verdict = {"pass", "warn"} & {*last["audit"]}
    assert last["audit"].tolist() == [*verdict, "none", "none", "none"]


def test_images_are_kept_for_each_threat_model(several: Path) -> None:
    kept = np.load(several / "adversarial.npz")
    assert len(kept["images"]) == 3 * 60
    assert list(dict.fromkeys(zip(kept["norm"], kept["eps"], strict=True))) == [
        ("linf", 0.1), ("l2", 0.3), ("linf", 0.2),
    ]  # fmt: skip
    assert kept["index"].tolist() == kept["index"][:60].tolist() * 3


def test_runs_of_different_threat_models_are_not_compared(
    several: Path, command_line: CommandLine
) -> None:
    words = ["model=mlp", "epochs=1", "evaluation=quick", "evaluation.samples=60", "eps=0.1"]
    place = several.parent
    alone = command_line.run(*words, "device=cpu", "hydra.run.dir=alone", cwd=place)
    assert alone.code == 0, alone.said
    answer = command_line.run("compare", "run", "alone", cwd=place)
    assert answer.code == 1
    assert "linf, eps 0.1 and l2, eps 0.3 and linf, eps 0.2" in answer.said
    assert command_line.run("compare", "run", "alone", "--clean", cwd=place).code == 0


def test_a_suite_that_is_weaker_than_its_probe_fails(
    command_line: CommandLine, tmp_path: Path
) -> None:
    """Random noise alone; what the probe breaks counts all the same."""
    fewer = [f"~evaluation.attacks.{name}" for name in ("fgsm", "pgd", "apgd_ce")]
    words = ["model=mlp", "epochs=8", "batch_size=128", "eps=0.1"]
    words += ["evaluation=quick", "evaluation.samples=100"]
    answer = command_line.run(*words, *fewer, "device=cpu", "hydra.run.dir=run", cwd=tmp_path)
    assert answer.code == 0, answer.said
    report = pd.read_csv(tmp_path / "run" / "report.csv").set_index("attack")
    assert report.loc["worst_case", "accuracy"] == report.loc["probe", "accuracy"]
    assert report.loc["uniform", "accuracy"] > report.loc["worst_case", "accuracy"] + 0.1
    curve = pd.read_csv(tmp_path / "run" / "curve.csv")
    within = curve[curve["eps"] <= 0.1]
    assert report.loc["worst_case", "accuracy"] <= within["accuracy"].min()
    audit = pd.read_csv(tmp_path / "run" / "audit.csv").set_index("check")
    assert audit.loc["probe breaks more than the suite by", "verdict"] == "fail"
    assert report.loc["worst_case", "audit"] == "fail"


def test_an_empty_suite_is_refused(command_line: CommandLine, tmp_path: Path) -> None:
    none = [f"~evaluation.attacks.{name}" for name in ("uniform", "fgsm", "pgd", "apgd_ce")]
    answer = command_line.run("evaluation=quick", *none, "hydra.run.dir=run", cwd=tmp_path)
    assert answer.code == 1
    assert "evaluation.attacks={} is not allowed: it must be one attack or more" in answer.said
    assert not (tmp_path / "run").exists()
