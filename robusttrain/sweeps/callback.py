"""Hydra's callback of a sweep, which knows where it lies and which jobs it has."""

import os
import sys
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, read_write

from robusttrain.errors import InputError
from robusttrain.report.terminal import Terminal
from robusttrain.run_directory import RECORDS
from robusttrain.runs.resume import quoted
from robusttrain.runtime import signals
from robusttrain.sweeps import launchers
from robusttrain.sweeps.monitor import COMPLAINT, watched
from robusttrain.sweeps.records import WAITING, Job


class _Start(NamedTuple):
    """What jobs in other processes have to know of the one that was started by the user."""

    folder: Path
    arguments: list[str]
    planned: list[Job]
    keys: list[str]


class Sweeps(Callback):
    """Tells the process that was started by the user where its sweep lies.

    Hydra's own notice of the end does not come where a job has failed or the user has stopped the
    sweep, which are the times when a summary is wanted most. An instance goes with every job into
    the process that runs it, where the attributes of the class are not those of here.
    """

    directory: ClassVar[Path | None] = None
    planned: ClassVar[list[Job]] = []
    # Those that were given more than one value, or a range.
    keys: ClassVar[list[str]] = []
    # What runs the jobs or chooses them, where Hydra's plain ways do not.
    engine: ClassVar[str] = ""
    maximises: ClassVar[bool] = False
    view: ClassVar[ExitStack] = ExitStack()
    elsewhere: ClassVar[bool] = False

    def __init__(self) -> None:
        self.start: _Start | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called once, before any job."""
        Sweeps.directory = Path(config.hydra.sweep.dir).absolute()
        Sweeps.planned, Sweeps.keys = planned(config), _keys(config)
        self.start = _Start(Path.cwd(), sys.argv, Sweeps.planned, Sweeps.keys)
        try:
            if launchers.sweeper(config) != launchers.PLAIN:
                Sweeps.engine = f"hydra/sweeper={launchers.sweeper(config)}"
                launchers.check_search(config)
                Sweeps.maximises = launchers.prepare_search(config)
            if launchers.launcher(config) != launchers.PLAIN:
                Sweeps.engine = f"hydra/launcher={launchers.launcher(config)}"
                self._prepare(config, Sweeps.directory)
        except InputError as error:
            # Hydra makes a warning of anything less.
            sys.exit(f"{COMPLAINT}{error}")

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called in the process of a job, before it."""
        if self.start is None or Sweeps.directory is not None:
            return
        Sweeps.elsewhere = True
        os.chdir(self.start.folder)
        _, sys.argv, Sweeps.planned, Sweeps.keys = self.start

    def _prepare(self, config: DictConfig, directory: Path) -> None:
        """Make ready for jobs in other processes, if there will be any."""
        if not launchers.prepare_launcher(config, _at_once(config)):
            return
        (directory / RECORDS).mkdir(parents=True, exist_ok=True)
        with read_write(config.hydra):
            # They make their configurations anew, and may have started in another folder.
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(directory)}")
        if launchers.launcher(config) == "joblib":
            # Its processes are killed as soon as this one leaves; they are to leave first.
            Sweeps.view.enter_context(signals.deferred())
        Sweeps.view.enter_context(watched(directory, Sweeps.planned, Terminal()))


def _at_once(config: DictConfig) -> int:
    """How many jobs the launcher gets at once, or 0 where that is not known."""
    sweeper = config.hydra.sweeper
    if launchers.sweeper(config) != launchers.PLAIN:
        return int(sweeper.get("n_jobs") or 0)
    return min(len(Sweeps.planned), sweeper.get("max_batch_size") or len(Sweeps.planned))


def planned(config: DictConfig) -> list[Job]:
    """All jobs of a sweep over a grid; none where only the sweeper knows what comes next."""
    if not str(config.hydra.sweeper["_target_"]).endswith(".BasicSweeper"):
        return []
    grid: dict[str, list[str]] = {}
    try:
        for one in _given(config):
            key = one.get_key_element()
            values = one.sweep_string_iterator() if one.is_sweep_override() else [_value(one)]
            grid[key] = [f"{key}={value}" for value in values]
    except HydraException:
        # A pattern such as defense=glob(*) needs to be looked up; what is wrong, Hydra will say.
        return []
    combinations = enumerate(product(*grid.values()))
    return [Job(number, "", words, WAITING) for number, words in combinations]


def _keys(config: DictConfig) -> list[str]:
    """The keys that a sweep goes through the values of."""
    return [one.get_key_element() for one in _given(config) if one.is_sweep_override()]


def _given(config: DictConfig) -> list[Override]:
    """What the user gave of a sweep, in its YAML and on the command line."""
    given = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    return OverridesParser.create().parse_overrides(given + config.hydra.overrides.task)


def _value(override: Override) -> str:
    return override.get_value_element_as_str()
