"""Hydra's callback of a sweep, which knows where it lies and which jobs it has."""

import os
import sys
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

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
from robusttrain.sweeps.monitor import COMPLAINT, monitored
from robusttrain.sweeps.records import WAITING, Job
from robusttrain.sweeps.session import SweepState, open_elsewhere, present


class Sweeps(Callback):
    """Tells the session of this process where its sweep lies, and which jobs it has.

    Hydra's own notice of the end does not come where a job has failed or the user has stopped the
    sweep, which are the times when a summary is wanted most. An instance goes with every job into
    the process that runs it.
    """

    def __init__(self) -> None:
        self.sweep: SweepState | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called once, before any job."""
        session = present()
        assert session is not None, "the command line opens it"
        try:
            self.sweep = session.sweep = _announced(config)
            if launchers.launcher(config) != launchers.PLAIN:
                _prepare(config, self.sweep, session.view)
        except InputError as error:
            # Hydra makes a warning of anything less.
            sys.exit(f"{COMPLAINT}{error}")

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called in the process of a job, before it."""
        session = present()
        if self.sweep is None or (session is not None and not session.elsewhere):
            return
        os.chdir(self.sweep.cwd)
        open_elsewhere(self.sweep)


def _announced(config: DictConfig) -> SweepState:
    """The sweep of a configuration, in which its sweeper gets what a search needs.

    Raises
    ------
    InputError
        If it is a search that could go by nothing.
    """
    engine, maximises = "", False
    if launchers.sweeper(config) != launchers.PLAIN:
        engine = f"hydra/sweeper={launchers.sweeper(config)}"
        launchers.check_search(config)
        maximises = launchers.prepare_search(config)
    if launchers.launcher(config) != launchers.PLAIN:
        engine = f"hydra/launcher={launchers.launcher(config)}"
    directory = Path(config.hydra.sweep.dir).absolute()
    jobs, keys = tuple(planned(config)), tuple(_keys(config))
    return SweepState(Path.cwd(), directory, jobs, keys, engine, maximises)


def _prepare(config: DictConfig, sweep: SweepState, view: ExitStack) -> None:
    """Make ready for jobs in other processes, if there will be any; `view` then shows them.

    The launcher is set up in `config` itself: Hydra goes by what its callbacks leave there.

    Raises
    ------
    InputError
        If no process is asked for.
    """
    if not launchers.prepare_launcher(config, _at_once(config, len(sweep.planned))):
        return
    (sweep.directory / RECORDS).mkdir(parents=True, exist_ok=True)
    with read_write(config.hydra):
        # They make their configurations anew, and may have started in another folder.
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(sweep.directory)}")
    if launchers.launcher(config) == "joblib":
        # Its processes are killed as soon as this one leaves; they are to leave first.
        view.enter_context(signals.deferred())
    view.enter_context(monitored(sweep.directory, sweep.planned, Terminal()))


def _at_once(config: DictConfig, jobs: int) -> int:
    """How many of so many jobs the launcher gets at once, or 0 where that is not known."""
    sweeper = config.hydra.sweeper
    if launchers.sweeper(config) != launchers.PLAIN:
        return int(sweeper.get("n_jobs") or 0)
    return min(jobs, sweeper.get("max_batch_size") or jobs)


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
