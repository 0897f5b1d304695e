"""Runs on digits: `index` finds each image in scikit-learn's digits, and chooses it again."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from robusttrain import load_model
from robusttrain.data.digits import Digits
from robusttrain.runs.rerun import Repetition
from toys.command_line import CommandLine

SUITE = [
    "evaluation=quick", "evaluation.audit=false", "~evaluation.attacks.apgd_ce", "device=cpu",
]  # fmt: skip
FIRST = 20


@pytest.fixture(scope="module")
def run(command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the first test images in the order of scikit-learn."""
    words = ["model=linear", "epochs=1", *SUITE, "evaluation.save_adversarial=true"]
    answer = command_line.run(
        *words, f"evaluation.first={FIRST}", "hydra.run.dir=run", cwd=tmp_path_factory.mktemp("run")
    )
    assert answer.code == 0, answer.said
    return answer.run_dir


def images(index: "NDArray[np.int64] | pd.Series[int]") -> torch.Tensor:
    """The images at these positions, as scikit-learn publishes them: 16 levels of grey."""
    levels = torch.from_numpy(load_digits().images[np.asarray(index)]).float()[:, None]
    return (levels * (255 / 16)).round() / 255


def test_index_finds_the_images_in_the_published_data_set(run: Path) -> None:
    samples = pd.read_csv(run / "samples.csv")
    assert load_digits().target[samples["index"]].tolist() == samples["label"].tolist()
    predicted = load_model(run)(images(samples["index"])).argmax(1)
    assert predicted.tolist() == samples["clean_prediction"].tolist()
    arrays = np.load(run / "adversarial.npz")
    assert arrays["index"].tolist() == samples["index"].tolist()
    assert np.abs(arrays["images"] - images(arrays["index"]).numpy()).max() <= 0.1 + 1e-6
    assert set(samples["index_in"]) == set(arrays["index_in"]) == {"data set"}


def test_first_takes_the_first_test_images_of_the_data_set(run: Path) -> None:
    found = sorted(pd.read_csv(run / "samples.csv")["index"])
    assert found == sorted(Digits().test_positions().tolist())[:FIRST]


def test_indices_evaluate_exactly_these_images(
    run: Path, command_line: CommandLine, tmp_path: Path
) -> None:
    """Images that a first evaluation found are evaluated again, and nothing else."""
    before = pd.read_csv(run / "samples.csv").set_index("index")
    chosen = [int(index) for index in before.index[[9, 2, 14]]]
    again = ["stages=[evaluate]", f"checkpoint={run}", *SUITE]
    answer = command_line.run(*again, f"evaluation.indices={chosen}", cwd=tmp_path)
    assert answer.code == 0, answer.said
    found = pd.read_csv(answer.run_dir / "samples.csv").set_index("index")
    assert sorted(found.index) == sorted(chosen)
    clean = ["label", "clean_prediction"]
    assert found[clean].equals(before.loc[found.index, clean])


def test_a_baseline_has_the_same_images(
    run: Path, command_line: CommandLine, tmp_path: Path
) -> None:
    again = ["stages=[evaluate]", f"checkpoint={run}", *SUITE, f"evaluation.baseline={run}"]
    answer = command_line.run(*again, f"evaluation.first={FIRST}", cwd=tmp_path)
    assert answer.code == 0, answer.said
    other = command_line.run(*again, f"evaluation.first={FIRST - 1}", cwd=tmp_path)
    assert other.code == 1
    assert "it has 20 images, and this run 19" in other.err


def test_a_repetition_of_an_earlier_run_may_count_otherwise(tmp_path: Path) -> None:
    before, now = tmp_path / "run", tmp_path / "run-rerun"
    for folder in (before, now):
        folder.mkdir()
    old = pd.DataFrame({"index": [0, 1], "label": [5, 8], "clean_prediction": [5, 3]})
    new = old.assign(index=[1245, 220])
    new.insert(1, "index_in", "data set")
    old.to_csv(before / "samples.csv", index=False)
    new.to_csv(now / "samples.csv", index=False)
    assert Repetition(before, {}, ()).differences() == []
    new.assign(clean_prediction=[5, 8]).to_csv(now / "samples.csv", index=False)
    (now / "manifest.json").write_text("{}")
    (line,) = Repetition(before, {}, ()).differences()
    assert "samples.csv differs, first in clean_prediction of row 1: 3, now 8" in line
