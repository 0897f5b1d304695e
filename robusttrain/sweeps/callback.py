"""A callback of Hydra that announces a sweep: its directory, its jobs and its launcher."""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from robusttrain import ranges
from robusttrain.errors import InputError
from robusttrain.report.page import Page
from robusttrain.report.terminal import Terminal
from robusttrain.report.verbosity import Verbosity
from robusttrain.run_directory import RECORDS
from robusttrain.runs.resume import quoted
from robusttrain.runtime import distributed, signals
from robusttrain.sweeps import launchers
from robusttrain.sweeps.effect import refuse_unread
from robusttrain.sweeps.monitor import COMPLAINT, monitored
from robusttrain.sweeps.pairs import Comparison
from robusttrain.sweeps.records import WAITING, Job, refuse_exchanged
from robusttrain.sweeps.session import SweepState, open_in_worker, present


def _refuse_chdir(config: DictConfig) -> None:
    """Refuse a run in another directory than that of the command.

    Raises
    ------
    InputError
        If `hydra.job.chdir` is true.
    """
    allowed = "false, since relative paths such as data_dir start in the directory of the command"
    ranges.require(not config.hydra.job.chdir, "hydra.job.chdir", True, allowed)


class Sweeps(Callback):
    """Announce the sweep to the session of this process.

    The summary is not written here: Hydra does not call a callback at the end if a job has failed
    or the user has stopped the sweep, when a summary is needed most. An instance is sent with every
    job to the process that runs it.

    Parameters
    ----------
    baseline, accuracies
        What the summary compares, as in `Comparison.of`. They are no keys of a job, so that the
        same jobs can be compared in another way.
    """

    def __init__(
        self, baseline: str | None = None, accuracies: str | Sequence[str] | None = None
    ) -> None:
        self.compared = baseline, accuracies
        self.sweep: SweepState | None = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse what Hydra would do before the run."""
        try:
            _refuse_chdir(config)
        except InputError as error:
            sys.exit(distributed.exit_message(f"{COMPLAINT}{error}"))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Announce the sweep and prepare its launcher, before any job."""
        session = present()
        assert session is not None, "the command line opens it"
        try:
            _refuse_chdir(config)
            assert session.unread is not None, "the command line passes it"
            refuse_unread(config, session.unread)
            sweep = _announced(config, Comparison.of(*self.compared))
            refuse_exchanged(sweep.directory)
            self.sweep = session.sweep = sweep
            if launchers.launcher(config) != launchers.PLAIN:
                _prepare(config, self.sweep, session.view)
        except InputError as error:
            # Hydra turns other exceptions into warnings.
            sys.exit(f"{COMPLAINT}{error}")

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Open a session in a worker process, before its job."""
        session = present()
        if self.sweep is None or (session is not None and not session.in_worker):
            return
        os.chdir(self.sweep.cwd)
        open_in_worker(self.sweep)


def _announced(config: DictConfig, comparison: Comparison) -> SweepState:
    """The sweep that a configuration describes; the sampler of a search is seeded in place.

    Raises
    ------
    InputError
        If it is a search whose runs return no figure, or its jobs would lie outside its directory,
        or no setting can be the baseline of `comparison`.
    """
    engine, maximises = "", False
    if launchers.sweeper(config) != launchers.PLAIN:
        engine = f"hydra/sweeper={launchers.sweeper(config)}"
        launchers.check_search(config)
        maximises = launchers.prepare_search(config)
    if launchers.launcher(config) != launchers.PLAIN:
        engine = f"hydra/launcher={launchers.launcher(config)}"
    _refuse_outside(config)
    directory = Path(config.hydra.sweep.dir).absolute()
    jobs, keys = tuple(planned(config)), tuple(_keys(config))
    comparison.check(_values(jobs, keys))
    # The schema has copies of the classes, which do not pickle.
    verbosity, page = Verbosity(config.verbosity), Page(config.report)
    return SweepState(
        Path.cwd(), directory, jobs, keys, engine, maximises, comparison, verbosity, page
    )


def _refuse_outside(config: DictConfig) -> None:
    """Refuse directories of jobs that are not below that of the sweep."""
    # Not resolved, since jobs have their numbers later.
    plain: Any = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    subdir = str(plain["subdir"])
    if Path(subdir).is_absolute() or ".." in Path(subdir).parts:
        raise InputError("hydra.sweep.subdir", subdir, "a path below hydra.sweep.dir")


def _prepare(config: DictConfig, sweep: SweepState, view: ExitStack) -> None:
    """Prepare for jobs in other processes, if there will be any; `view` then shows them.

    The launcher is set up in `config` itself, which Hydra reads after its callbacks.

    Raises
    ------
    InputError
        If the launcher is to use no process.
    """
    if not launchers.prepare_launcher(config, _at_once(config, len(sweep.planned))):
        return
    (sweep.directory / RECORDS).mkdir(parents=True, exist_ok=True)
    with read_write(config.hydra):
        # Workers compose their configurations again, maybe from another working directory.
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(sweep.directory)}")
    if launchers.launcher(config) == "joblib":
        # joblib kills its workers when this process exits, so they have to exit first.
        view.enter_context(signals.deferred())
    terminal = Terminal(verbosity=sweep.verbosity)
    view.enter_context(monitored(sweep.directory, sweep.planned, terminal))


def _at_once(config: DictConfig, jobs: int) -> int:
    """How many of `jobs` jobs the launcher gets at once, or 0 if that is unknown."""
    sweeper = config.hydra.sweeper
    if launchers.sweeper(config) != launchers.PLAIN:
        return int(sweeper.get("n_jobs") or 0)
    return min(jobs, sweeper.get("max_batch_size") or jobs)


def planned(config: DictConfig) -> list[Job]:
    """All jobs of a grid; none for a search, whose jobs are not known beforehand."""
    if not str(config.hydra.sweeper["_target_"]).endswith(".BasicSweeper"):
        return []
    grid: dict[str, list[str]] = {}
    try:
        for one in _given(config):
            key = one.get_key_element()
            values = one.sweep_string_iterator() if one.is_sweep_override() else [_value(one)]
            grid[key] = [f"{key}={value}" for value in values]
    except HydraException:
        # Either a pattern such as defense=glob(*), or a mistake that Hydra will report.
        return []
    combinations = enumerate(product(*grid.values()))
    return [Job(number, "", words, WAITING) for number, words in combinations]


def _keys(config: DictConfig) -> list[str]:
    """The keys that have several values."""
    return [one.get_key_element() for one in _given(config) if one.is_sweep_override()]


def _values(jobs: Sequence[Job], keys: Sequence[str]) -> dict[str, list[str]]:
    """The values of each of the `keys` in the planned `jobs`."""
    names = [key.lstrip("+~") for key in keys]
    return {name: list(dict.fromkeys(job.settings[name] for job in jobs)) for name in names}


def _given(config: DictConfig) -> list[Override]:
    """The overrides of a sweep, in its YAML and on the command line."""
    given = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    return OverridesParser.create().parse_overrides(given + config.hydra.overrides.task)


def _value(override: Override) -> str:
    return override.get_value_element_as_str()
