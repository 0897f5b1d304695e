"""A run that an earlier version has saved is one of today's.

`before_packages` was made by the last version whose modules lay side by side, with the command in
its `command.json`. Its `checkpoint.previous.pt` is that of epoch 3 of 4.
"""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from robusttrain import load_model
from robusttrain.checkpoints import checkpoint
from robusttrain.data import as_input
from robusttrain.data.digits import Digits
from robusttrain.sweeps.records import Job, read_job
from toys.command_line import CommandLine

OLD = Path(__file__).with_name("before_packages")


def accuracies(run: Path) -> dict[str, float]:
    return pd.read_csv(run / "report.csv").set_index("attack")["accuracy"].to_dict()


def test_its_model_is_loaded() -> None:
    samples = pd.read_csv(OLD / "samples.csv")
    images = as_input(Digits().load()[1].images[torch.tensor(samples["index"].to_numpy())])
    model = load_model(OLD)
    assert not model.training
    assert model(images).argmax(1).tolist() == samples["clean_prediction"].tolist()


def test_it_is_evaluated_again(command_line: CommandLine, tmp_path: Path) -> None:
    """With its data, defense and radius, which are not given again."""
    answer = command_line.run(
        f"checkpoint={OLD}", "stages=[evaluate]", "evaluation=quick", "evaluation.samples=40",
        cwd=tmp_path,
    )  # fmt: skip
    assert answer.code == 0, answer.said
    report = pd.read_csv(answer.run_dir / "report.csv").iloc[0]
    assert (report["dataset"], report["model"], report["defense"]) == ("digits", "mlp", "trades")
    # It has saved no such name, but its configuration.
    assert report["train_attack"] == "pgd_gaussian-10"
    # Rounding differs from processor to processor, by an image at most.
    assert accuracies(answer.run_dir) == pytest.approx(accuracies(OLD), abs=1.5 / 40)


def test_its_training_is_resumed(command_line: CommandLine, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(OLD / "command.json", run)
    shutil.copy(OLD / "checkpoint.previous.pt", run / "checkpoint.pt")
    answer = command_line.run(f"resume={run}", cwd=tmp_path)
    assert answer.code == 0, answer.said
    ours, theirs = checkpoint.load(run).model, checkpoint.load(OLD).model
    for key, value in theirs.items():
        assert torch.allclose(ours[key], value, atol=1e-4), key
    assert pd.read_csv(run / "train.csv")["epoch"].tolist() == [1, 2, 3, 4]


def test_it_is_compared(command_line: CommandLine, tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "other")
    answer = command_line.run("compare", OLD, tmp_path / "other", cwd=tmp_path)
    assert answer.code == 0, answer.said


def test_a_job_of_its_sweep_has_the_names_of_today(tmp_path: Path) -> None:
    """So that a sweep that was started again knows what has finished."""
    Job(0, "0", ("seed=1",), config="optimizer:\n  _target_: robusttrain.optimizers.SGD\n").save(
        tmp_path
    )
    read = read_job(tmp_path, "0")
    assert read is not None
    assert read.config == "optimizer:\n  _target_: robusttrain.optim.optimizers.SGD\n"
