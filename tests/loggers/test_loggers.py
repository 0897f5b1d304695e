"""Loggers: figures are read back as they were written, under the same names."""

import importlib.util
import math
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robusttrain import loggers
from robusttrain.errors import InputError
from robusttrain.loggers import Logger, epoch_figures, flattened, report_figures
from robusttrain.loggers.mlflow import MLflow
from robusttrain.loggers.none import NoLogger
from robusttrain.loggers.tensorboard import TensorBoard
from toys.logged import Scalars, in_events

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="TensorBoard is not installed"
)
needs_mlflow = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mlflow", "sqlalchemy", "alembic")),
    reason="MLflow is not installed",
)


def query(folder: Path, sql: str) -> list[Any]:
    """The rows of a query, read from the database without MLflow."""
    return sqlite3.connect(folder / "mlflow.db").execute(sql).fetchall()


def in_database(folder: Path) -> Scalars:
    found = query(folder, "SELECT key, step, value, is_nan FROM metrics")
    return {(key, step): math.nan if is_nan else value for key, step, value, is_nan in found}


FIGURES = {
    1: {"train/loss": 0.1 + 0.2, "train/lr": 1e-30, "train/seconds": 1234567.891},
    2: {"train/loss": -1 / 3, "train/val_robust_accuracy": 0.0},
    3: {"report/apgd_t_targets_4/accuracy": 2 / 3, "report/clean/n": 10000.0},
}
EXPECTED = {(name, step): value for step, row in FIGURES.items() for name, value in row.items()}
PARAMETERS: dict[str, Any] = {
    "defense": "madry", "eps": 8 / 255, "stages": ["train"], "checkpoint": None, "x": "y" * 9000,
    **{f"many.{number}": number for number in range(250)},
}  # fmt: skip


def keep(logger: Logger, run_dir: Path) -> None:
    logger.check()
    with logger.record(run_dir, PARAMETERS) as record:
        for epoch, figures in FIGURES.items():
            record(figures, epoch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an MLflow database, which takes seconds to create.

    Its name has characters with a meaning in URLs.
    """
    return tmp_path_factory.mktemp("a b%20c?d") / "not" / "there yet"


@pytest.fixture(scope="module")
def database(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    keep(MLflow(str(folder)), tmp_path_factory.mktemp("runs") / "day" / "time")
    return folder


def test_no_logger_writes_nothing(tmp_path: Path) -> None:
    keep(NoLogger(), tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- TensorBoard -------------------------------------------------------------------------------


@needs_tensorboard
def test_tensorboard_keeps_figures_in_float32(tmp_path: Path) -> None:
    keep(TensorBoard(), tmp_path)
    assert in_events(tmp_path) == {key: float(np.float32(value)) for key, value in EXPECTED.items()}


@needs_tensorboard
def test_tensorboard_shows_the_configuration(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    keep(TensorBoard(), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (text,) = events.Tensors("parameters/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert lines == [f"    {key}: {value}" for key, value in PARAMETERS.items()]


@needs_tensorboard
def test_tensorboard_figures_can_be_read_during_the_run(tmp_path: Path) -> None:
    with TensorBoard().record(tmp_path, {}) as record:
        for epoch in (1, 2, 3):
            record({"train/loss": 0.5}, epoch)
            assert max(step for _, step in in_events(tmp_path)) == epoch


@needs_tensorboard
def test_tensorboard_keeps_the_figures_of_a_failed_run(tmp_path: Path) -> None:
    with suppress(ZeroDivisionError), TensorBoard().record(tmp_path, {}) as record:
        record({"train/loss": 0.5}, 1)
        raise ZeroDivisionError
    assert in_events(tmp_path) == {("train/loss", 1): 0.5}


@needs_tensorboard
def test_tensorboard_leaves_no_files_of_a_run_that_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError), TensorBoard().record(tmp_path, PARAMETERS):
        raise InputError("eps", -1, "0 or more")
    assert list(tmp_path.iterdir()) == []


# --- MLflow ------------------------------------------------------------------------------------


@needs_mlflow
def test_mlflow_keeps_figures_to_the_last_bit(database: Path) -> None:
    assert in_database(database) == EXPECTED


@needs_mlflow
def test_mlflow_keeps_the_configuration(database: Path) -> None:
    kept = dict(query(database, "SELECT key, value FROM params"))
    assert kept == {key: str(value)[:6000] for key, value in PARAMETERS.items()}


@needs_mlflow
def test_mlflow_gathers_runs_under_their_experiment(database: Path, tmp_path: Path) -> None:
    logger = MLflow(str(database), experiment="other")
    with pytest.raises(ZeroDivisionError), logger.record(tmp_path / "day" / "0", {}):
        raise ZeroDivisionError
    joined = (
        "SELECT e.name, e.artifact_location, r.name, r.status, r.lifecycle_stage, t.value "
        "FROM runs r JOIN experiments e USING (experiment_id) JOIN tags t USING (run_uuid) "
        "WHERE t.key = 'run_dir' ORDER BY r.start_time"
    )
    first, second = query(database, joined)
    place = (database / "artifacts").as_uri()
    assert first[:-1] == ("robusttrain", place, "day/time", "FINISHED", "active")
    assert second == ("other", place, "day/0", "FAILED", "active", str(tmp_path / "day" / "0"))


@needs_mlflow
def test_mlflow_prints_nothing_and_leaves_the_working_directory_alone(
    tmp_path: Path, database: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    keep(MLflow(str(database), experiment="quiet"), tmp_path / "run")
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


@needs_mlflow
@pytest.mark.parametrize("spoil", ["file", "text", "newer"])
def test_a_place_that_mlflow_cannot_use_is_refused(
    tmp_path: Path, database: Path, spoil: str
) -> None:
    if spoil == "file":
        (tmp_path / "place").touch()
    else:
        (tmp_path / "place").mkdir()
        (tmp_path / "place" / "mlflow.db").write_text("no database at all\n" * 9)
    if spoil == "newer":
        (tmp_path / "place" / "mlflow.db").write_bytes((database / "mlflow.db").read_bytes())
        with sqlite3.connect(tmp_path / "place" / "mlflow.db") as connection:
            connection.execute("UPDATE alembic_version SET version_num = 'f0f0'")
    logger = MLflow(str(tmp_path / "place"))
    with (
        pytest.raises(InputError, match=r"^logger\.folder=.*place with logger\.experiment=robust"),
        logger.record(tmp_path, {}),
    ):
        pass


# --- names -------------------------------------------------------------------------------------


def test_figures_are_named_by_file_row_and_column() -> None:
    epoch = {"epoch": 3, "seconds": 1.5, "train_clean_accuracy": None, "loss": math.inf}
    assert epoch_figures(epoch) == {"train/seconds": 1.5, "train/loss": math.inf}
    row = dict.fromkeys(loggers.MEASURED, 0.5) | {"forward": math.nan, "n": 40}
    rows = [
        row | {"attack": "fab_t targets=4", "norm": "l2", "seed": 0, "defense": "madry"},
        row | {"attack": "eot_20"},
    ]
    named = dict.fromkeys(loggers.MEASURED, 0.5) | {"n": 40.0}
    del named["forward"]
    assert report_figures(rows) == {
        f"report/{attack}/{key}": value
        for attack in ("fab_t_targets_4", "eot_20")
        for key, value in named.items()
    }


def test_parameters_go_by_their_full_keys() -> None:
    config = {"eps": 0.1, "attack": {"steps": 3, "inner": {"list": [1, {"a": 2}]}, "none": {}}}
    assert flattened(config) == {"eps": 0.1, "attack.steps": 3, "attack.inner.list": [1, {"a": 2}]}


@pytest.mark.parametrize("option", ["tensorboard", "mlflow"])
def test_a_package_that_is_not_there_is_named_with_its_extra(option: str) -> None:
    with pytest.raises(InputError) as caught:
        loggers.require(option, "math", "no_such_package")
    assert str(caught.value) == (
        f"logger={option} needs a package that is not installed (No module named "
        f"'no_such_package'): pip install 'robusttrain[{option}]'"
    )


@pytest.mark.parametrize(
    ("logger", "modules"),
    [(TensorBoard(), ["torch.utils.tensorboard"]), (MLflow(), ["mlflow", "sqlalchemy", "alembic"])],
)
def test_a_logger_checks_for_all_that_it_needs(
    logger: Logger, modules: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    remember: Callable[[str], None] = asked.append
    monkeypatch.setattr(importlib, "import_module", remember)
    logger.check()
    assert asked == modules
