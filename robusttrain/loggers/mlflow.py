"""MLflow: the runs of many days in one local database, to be searched and compared."""

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

# Limits of MLflow on one request and on a value.
PARAMETERS_AT_ONCE = 100
LONGEST_VALUE = 6000

# Nothing leaves the machine, and nothing but warnings goes to the terminal, unless the user wants.
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING"}


@dataclass
class MLflow:
    """Adds a run to an experiment in `folder`: figures as metrics, the configuration as parameters.

    The run is named after its directory, which is in its tag `run_dir`; it ends as FINISHED or
    FAILED. `folder` holds an SQLite database, as MLflow only maintains its older store of plain
    files, and refuses it unless told otherwise. The pages come with `pip install mlflow`:
    `mlflow ui --backend-store-uri sqlite:///outputs/mlflow/mlflow.db`.

    Parameters
    ----------
    folder
        Where the database is, or will be made.
    experiment
        The name that the runs are gathered under.
    """

    folder: str = "outputs/mlflow"
    experiment: str = "robusttrain"

    def check(self) -> None:
        """Raise `InputError` if MLflow or what its database needs is not installed."""
        for variable, value in QUIET.items():
            os.environ.setdefault(variable, value)
        require("mlflow", "mlflow", "sqlalchemy", "alembic")

    @contextmanager
    def record(self, run_dir: Path, parameters: Mapping[str, Any]) -> Iterator[Record]:
        """A run of MLflow.

        Raises
        ------
        InputError
            If `folder` or `experiment` cannot be used.
        """
        from mlflow.entities import Metric, Param

        client, run = self._started(run_dir)
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

    def _started(self, run_dir: Path) -> tuple[Any, str]:
        """A client of the database, and the identifier of a new run; makes what is not there."""
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        folder = Path(self.folder).resolve()
        database = folder / "mlflow.db"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _try(database)
            client = MlflowClient(f"sqlite:///{quote(str(database))}")
            name, tags = "/".join(run_dir.parts[-2:]), {"run_dir": str(run_dir)}
            run = client.create_run(self._identifier(client, folder), tags=tags, run_name=name)
        except (OSError, sqlite3.Error, MlflowException) as error:
            given = f"logger.folder={self.folder} with logger.experiment={self.experiment}"
            raise InputError(given, allowed=str(error), problem="cannot be used") from error
        return client, run.info.run_id

    def _identifier(self, client: Any, folder: Path) -> str:
        """What MLflow calls the experiment, which is made if it is not there."""
        found = client.get_experiment_by_name(self.experiment)
        if found is not None:
            return str(found.experiment_id)
        # Otherwise a folder of the working directory.
        artifacts = (folder / "artifacts").as_uri()
        return str(client.create_experiment(self.experiment, artifact_location=artifacts))


def _try(database: Path) -> None:
    """Raise `sqlite3.Error` if `database` cannot be written; MLflow would go on trying for long."""
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("BEGIN IMMEDIATE")
