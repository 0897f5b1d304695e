"""Runs with a logger: the same figures as in their files, and the same weights as without one."""

import importlib.util
import math
import sqlite3
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from robusttrain.checkpoints import checkpoint
from robusttrain.loggers import MEASURED
from toys.command_line import CommandLine
from toys.external import TINY, Answer
from toys.logged import Scalars, in_events
from toys.runs import SAYS_LOADED, Answers, assert_refused

# Five classes allow four targets only, and the name of the row has that: "t targets=4".
QUICK = [
    *TINY, "model=linear", "epochs=3", "evaluation.attacks.pgd.steps=3",
    "+attack@evaluation.attacks.t=apgd_t", "evaluation.attacks.t.steps=2", "training.keep=last",
]  # fmt: skip
DIVERGING = [
    *TINY, "model=linear", "epochs=3", "optimizer=sgd", "schedule=step",
    "schedule.milestones=[0.4]", "schedule.gamma=1e38", "logger=mlflow",
    "logger.experiment=diverging",
]  # fmt: skip
PACKAGES = {"tensorboard": ["tensorboard"], "mlflow": ["mlflow", "sqlalchemy", "alembic"]}
INSTALLED = [
    name
    for name, packages in PACKAGES.items()
    if all(importlib.util.find_spec(package) for package in packages)
]

needs_tensorboard = pytest.mark.skipif(
    "tensorboard" not in INSTALLED, reason="TensorBoard is not installed"
)
needs_mlflow = pytest.mark.skipif(
    "mlflow" not in INSTALLED,
    reason="MLflow is not installed",
)


def in_files(run_dir: Path) -> Scalars:
    """The figures that a logger must have received, from the tables of the run."""
    table = pd.read_csv(run_dir / "train.csv")
    kept = {
        (f"train/{column}", int(row["epoch"])): row[column]
        for row in table.to_dict("records")
        for column in table.columns.drop("epoch")
    }
    best = checkpoint.load(run_dir / "best.pt").epoch
    for row in pd.read_csv(run_dir / "report.csv").to_dict("records"):
        name = row["attack"].replace("t targets=4", "t_targets_4")
        kept |= {(f"report/{name}/{column}", best): row[column] for column in MEASURED}
    return {key: float(value) for key, value in kept.items() if not math.isnan(value)}


@pytest.fixture(scope="module")
def answers(command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """The same run with each logger, and one that fails."""
    folder = tmp_path_factory.mktemp("loggers")
    commands = {"none": QUICK, **{name: [*QUICK, f"logger={name}"] for name in INSTALLED}}
    if "mlflow" in INSTALLED:
        # In the database of the previous run.
        place = folder / str(list(commands).index("mlflow")) / "outputs" / "mlflow"
        commands["diverging"] = [*DIVERGING, f"logger.folder={place}"]
    return command_line.each(commands, folder)


@pytest.fixture(scope="module")
def plain(answers: Answers) -> Path:
    return answers["none"].run_dir


@pytest.fixture(scope="module")
def watched(answers: Answers) -> Path:
    return answers["tensorboard"].run_dir


@pytest.fixture(scope="module")
def tracked(answers: Answers) -> Path:
    return answers["mlflow"].run_dir


@pytest.fixture(scope="module")
def database(answers: Answers) -> Path:
    """The default place of the database."""
    return answers["mlflow"].cwd / "outputs" / "mlflow" / "mlflow.db"


def rows(database: Path, sql: str, *values: str) -> list[tuple[Any, ...]]:
    """The rows of a query, read from the database without MLflow."""
    return sqlite3.connect(database).execute(sql, values).fetchall()


def of_run(database: Path, run_dir: Path, table: str, *columns: str) -> list[tuple[Any, ...]]:
    chosen = ", ".join(f"{table}.{column}" for column in columns)
    tagged = f"{table} JOIN tags USING (run_uuid) WHERE tags.key = 'run_dir' AND tags.value = ?"
    return rows(database, f"SELECT {chosen} FROM {tagged}", str(run_dir))


@needs_tensorboard
def test_tensorboard_gets_the_figures_of_the_files(watched: Path) -> None:
    expected = in_files(watched)
    assert ("train/val_robust_accuracy", 3) in expected
    assert [key for key in expected if key[0] == "report/t_targets_4/accuracy"]
    # Files have six digits, float32 has seven.
    assert in_events(watched) == pytest.approx(expected, rel=1e-5)


@needs_mlflow
def test_mlflow_gets_the_figures_of_the_files(tracked: Path, database: Path) -> None:
    found = of_run(database, tracked, "metrics", "key", "step", "value")
    written = {(key, step): f"{value:.6g}" for key, step, value in found}
    assert written == {key: f"{value:.6g}" for key, value in in_files(tracked).items()}


@needs_mlflow
def test_mlflow_gets_the_options_and_the_resolved_configuration(
    tracked: Path, database: Path
) -> None:
    found = dict(of_run(database, tracked, "params", "key", "value"))
    said = {
        "defense": "madry", "model": "linear", "logger": "mlflow", "epochs": "3",
        "training.epochs": "3", "defense.attack.eps": "0.1", "evaluation.attacks.pgd.steps": "3",
        "checkpoint": "None",
    }  # fmt: skip
    assert found.items() >= said.items()


@pytest.mark.parametrize(
    "logger",
    [pytest.param("watched", marks=needs_tensorboard), pytest.param("tracked", marks=needs_mlflow)],
)
def test_a_logger_changes_no_results(
    plain: Path, logger: str, request: pytest.FixtureRequest
) -> None:
    other = request.getfixturevalue(logger)
    for name in ("best.pt", "checkpoint.pt"):
        saved = [torch.load(run_dir / name) for run_dir in (plain, other)]
        weights = [content["model"] for content in saved]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    states = [content["training"]["random_states"] for content in saved]
    assert torch.equal(states[0]["torch"], states[1]["torch"])
    for name in ("train.csv", "report.csv"):
        tables = [pd.read_csv(run_dir / name).drop(columns="seconds") for run_dir in (plain, other)]
        pd.testing.assert_frame_equal(*tables)
    assert (plain / "samples.csv").read_bytes() == (other / "samples.csv").read_bytes()


@needs_tensorboard
def test_a_model_that_was_not_trained_here_is_reported_at_epoch_0(
    plain: Path, tmp_path: Path
) -> None:
    again = ["stages=[evaluate]", f"checkpoint='{plain}'", "logger=tensorboard"]
    Answer(tmp_path / "run", *QUICK, *again)
    found = in_events(tmp_path / "run")
    assert {step for _, step in found} == {0}
    report = pd.read_csv(plain / "report.csv").set_index("attack")["accuracy"]
    assert found["report/worst_case/accuracy", 0] == pytest.approx(report["worst_case"], rel=1e-5)


@needs_mlflow
def test_a_run_that_diverges_is_marked_as_failed(answers: Answers, database: Path) -> None:
    assert "the loss or its gradient became" in answers["diverging"].err
    (table,) = answers["diverging"].cwd.glob("outputs/*/*/train.csv")
    joined = (
        "SELECT r.status, max(m.step) FROM runs r JOIN experiments e USING (experiment_id) "
        "JOIN metrics m USING (run_uuid) WHERE e.name = 'diverging' GROUP BY r.run_uuid"
    )
    assert rows(database, joined) == [("FAILED", len(pd.read_csv(table)))]


def test_a_logger_without_its_package_is_refused_before_any_work(
    command_line: CommandLine, tmp_path: Path
) -> None:
    """Modules that cannot be imported precede installed ones in the path."""
    for name in ("tensorboard", "mlflow"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} here')\n")
    options = {name: ["dataset=synthetic", f"logger={name}"] for name in ("tensorboard", "mlflow")}
    answers = command_line.each(
        options, tmp_path / "runs", first=SAYS_LOADED, PYTHONPATH=str(tmp_path)
    )
    for name, answer in answers.items():
        assert_refused(answer, [f"logger={name}", f"pip install 'robusttrain[{name}]'"])
        assert answer.code == 1
        assert "LOADED" not in answer.out


@pytest.mark.parametrize(("logger", "own"), [("tensorboard", {"tensorboard"}), ("mlflow", set())])
def test_a_logger_prints_nothing_and_adds_only_its_own_files(
    answers: Answers, logger: str, own: set[str]
) -> None:
    if logger not in INSTALLED:
        pytest.skip(f"{logger} is not installed")
    plain, other = answers["none"], answers[logger]
    assert (other.code, other.err) == (0, "")
    assert len(other.out.splitlines()) == len(plain.out.splitlines())
    left = [{path.name for path in answer.run_dir.iterdir()} for answer in (plain, other)]
    assert left[1] - left[0] == own
    log = (other.run_dir / "robusttrain.log").read_text()
    assert len(log.splitlines()) == len(
        (plain.run_dir / "robusttrain.log").read_text().splitlines()
    )
