"""Runs that were saved by an earlier version still work.

`before_packages` was made by the last version without packages, with the command in its
`command.json`. Its `checkpoint.previous.pt` is that of epoch 3 of 4.
"""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits

from robusttrain import load_model
from robusttrain.checkpoints import checkpoint
from robusttrain.data import as_input
from robusttrain.data.digits import Digits
from robusttrain.errors import IdentityWarning, InputError
from robusttrain.evaluation.requirements import Baseline
from robusttrain.report.compare import compare, read_run
from robusttrain.runs.resume import Command
from robusttrain.sweeps.records import Job, read_job
from toys.command_line import CommandLine

OLD = Path(__file__).with_name("before_packages")


def accuracies(run: Path) -> dict[str, float]:
    return pd.read_csv(run / "report.csv").set_index("attack")["accuracy"].to_dict()


def test_its_model_is_loaded() -> None:
    samples = pd.read_csv(OLD / "samples.csv")
    images = as_input(Digits().load()[1].images[torch.tensor(samples["index"].to_numpy())])
    with pytest.warns(IdentityWarning, match=r"before_packages is of an earlier version"):
        model = load_model(OLD)
    assert not model.training
    assert model(images).argmax(1).tolist() == samples["clean_prediction"].tolist()


def test_it_is_evaluated_again(command_line: CommandLine, tmp_path: Path) -> None:
    """With its data, defense and radius, although they are not set."""
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
    found, before = accuracies(answer.run_dir), accuracies(OLD)
    # Today the searches of the audit count, too.
    assert found.pop("probe") >= found.pop("worst_case") <= before.pop("worst_case")
    assert found == pytest.approx(before, abs=1.5 / 40)


def test_its_training_is_resumed(command_line: CommandLine, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    command = json.loads((OLD / "command.json").read_text())
    # Values that the recipe of the run had then.
    command["words"] += ["batch_size=64", "optimizer.lr=0.005", "evaluation.probe_samples=100"]
    (run / "command.json").write_text(json.dumps(command))
    shutil.copy(OLD / "checkpoint.previous.pt", run / "checkpoint.pt")
    answer = command_line.run(f"resume={run}", cwd=tmp_path)
    assert answer.code == 0, answer.said
    ours, theirs = (checkpoint.load(folder / "best.pt").model for folder in (run, OLD))
    for key, value in theirs.items():
        assert torch.allclose(ours[key], value, atol=1e-4), key
    assert pd.read_csv(run / "train.csv")["epoch"].tolist() == [1, 2, 3, 4]


def test_it_is_compared(command_line: CommandLine, tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "other")
    answer = command_line.run("compare", OLD, tmp_path / "other", cwd=tmp_path)
    assert answer.code == 0, answer.said


def test_its_positions_are_converted_as_the_manual_says() -> None:
    """The position of an image in the test set leads to its position in scikit-learn's digits."""
    samples = pd.read_csv(OLD / "samples.csv")
    assert "index_in" not in samples
    published = Digits().test_positions()[torch.tensor(samples["index"].to_numpy())]
    assert load_digits().target[published].tolist() == samples["label"].tolist()


def test_it_is_not_paired_with_a_run_that_counts_otherwise(tmp_path: Path) -> None:
    """The same images under other positions, some of which the old run has for other images."""
    new = shutil.copytree(OLD, tmp_path / "new")
    samples = pd.read_csv(OLD / "samples.csv")
    published = Digits().test_positions()[torch.tensor(samples["index"].to_numpy())]
    samples["index"] = published.numpy()
    samples.insert(1, "index_in", "data set")
    samples.to_csv(new / "samples.csv", index=False)
    runs = [read_run(folder) for folder in (OLD, new)]
    with pytest.raises(InputError, match="test set of one, and in the data set of the other"):
        compare(runs, runs[0].measures)
    with pytest.raises(InputError, match="positions in the test set, and this run in the data set"):
        Baseline(runs[0], (), "digest").refuse_other_images(
            "digest", published.tolist(), "data set"
        )
    # Nothing is in the way of pairs that count alike.
    assert (compare([runs[1], runs[1]], runs[0].measures)["difference"] == 0).all()
    Baseline(runs[1], (), "digest").refuse_other_images("digest", published.tolist(), "data set")


def test_a_job_of_its_sweep_has_current_names(tmp_path: Path) -> None:
    """A repeated sweep has to recognise its finished jobs."""
    old = "training:\n  curriculum:\n    smooth: true\n    _target_: robusttrain.optimizers.SGD\n"
    Job(0, "0", ("training.curriculum.smooth=true",), config=old).save(tmp_path)
    job = read_job(tmp_path, "0")
    assert job is not None
    assert job.overrides == ("training.curriculum.per_batch=true",)
    assert job.config == old.replace("smooth", "per_batch").replace(".opt", ".optim.opt")


def test_a_stored_command_line_has_current_keys(tmp_path: Path) -> None:
    """`resume=auto` has to find a run by the current keys."""
    old, new = (["seed=1", f"training.curriculum.{key}=true"] for key in ("smooth", "per_batch"))
    Command(old, old).write(tmp_path)
    assert Command.read(tmp_path) == Command(new, new)
