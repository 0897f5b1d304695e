"""MLflow: runs in one local database, for search and comparison."""

import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from robusttrain.errors import InputError
from robusttrain.loggers import Figures, Record, require

# MLflow's limits on the parameters of a request and on the length of a value.
PARAMETERS_AT_ONCE = 100
LONGEST_VALUE = 6000

# By default nothing is sent from the machine, and only warnings are printed.
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING"}


@dataclass
class MLflow:
    """Adds a run to an MLflow experiment: figures as metrics, the configuration as parameters.

    The run is named after its directory, which is also in its tag `run_dir`. It ends as FINISHED or
    FAILED. The database is SQLite, since MLflow refuses its older file store by default. The web
    pages come with `pip install mlflow`:
    `mlflow ui --backend-store-uri sqlite:///outputs/mlflow/mlflow.db`.

    Parameters
    ----------
    folder
        The folder of the database, which is created if needed.
    experiment
        The name of the experiment.
    """

    folder: str = "outputs/mlflow"
    experiment: str = "robusttrain"

    def check(self) -> None:
        """Raise `InputError` if MLflow or a package for its database is not installed."""
        for variable, value in QUIET.items():
            os.environ.setdefault(variable, value)
        require("mlflow", "mlflow", "sqlalchemy", "alembic")

    @contextmanager
    def record(self, run_dir: Path, parameters: Mapping[str, Any]) -> Iterator[Record]:
        """A context that adds one run to the experiment.

        Raises
        ------
        InputError
            If `folder` or `experiment` cannot be used.
        """
        from mlflow.entities import Metric, Param

        client, run = self._start_run(run_dir)
        params = [Param(key, str(value)[:LONGEST_VALUE]) for key, value in parameters.items()]
        for start in range(0, len(params), PARAMETERS_AT_ONCE):
            client.log_batch(run, params=params[start : start + PARAMETERS_AT_ONCE])

        def write(figures: Figures, epoch: int) -> None:
            now = int(time.time() * 1000)
            metrics = [Metric(name, value, now, epoch) for name, value in figures.items()]
            client.log_batch(run, metrics=metrics)

        status = "FAILED"
        try:
            yield write
            status = "FINISHED"
        finally:
            client.set_terminated(run, status)

    def _start_run(self, run_dir: Path) -> tuple[Any, str]:
        """A client of the database, and the identifier of a new run."""
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        folder = Path(self.folder).resolve()
        database = folder / "mlflow.db"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _check_writable(database)
            client = MlflowClient(f"sqlite:///{quote(str(database))}")
            name, tags = "/".join(run_dir.parts[-2:]), {"run_dir": str(run_dir)}
            run = client.create_run(self._experiment_id(client, folder), tags=tags, run_name=name)
        except (OSError, sqlite3.Error, MlflowException) as error:
            given = f"logger.folder={self.folder} with logger.experiment={self.experiment}"
            raise InputError(given, allowed=str(error), problem="cannot be used") from error
        return client, run.info.run_id

    def _experiment_id(self, client: Any, folder: Path) -> str:
        """MLflow's identifier of the experiment, which is created if needed."""
        found = client.get_experiment_by_name(self.experiment)
        if found is not None:
            return str(found.experiment_id)
        # By default MLflow puts artifacts into the working directory.
        artifacts = (folder / "artifacts").as_uri()
        return str(client.create_experiment(self.experiment, artifact_location=artifacts))


def _check_writable(database: Path) -> None:
    """Raise `sqlite3.Error` if `database` cannot be written; MLflow would retry for a long time."""
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("BEGIN IMMEDIATE")
