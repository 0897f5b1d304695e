"""The command line of runs and sweeps: compose the configuration, run, exit with a code."""

import copy
import logging
import os
import shlex
import sys
import time
import traceback
import warnings
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import hydra
import torch
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from robusttrain import seeding
from robusttrain.cli.arguments import DRY_RUN, arguments
from robusttrain.config import build as configs
from robusttrain.config import schema, unread
from robusttrain.config.error_messages import EXPECTED_ERRORS, explain
from robusttrain.config.run_config import Config
from robusttrain.config.schema import CONF
from robusttrain.errors import InputError, ProcessLostError
from robusttrain.exit_codes import ExitCode, of_signal
from robusttrain.report.terminal import Terminal
from robusttrain.run_directory import PREAMBLE
from robusttrain.runs import experiment, outcome
from robusttrain.runs.context import Origin
from robusttrain.runs.hidden import refuse_hidden
from robusttrain.runs.inherit import inherit_config, refuse_unknown_keys
from robusttrain.runs.lock import alone_in
from robusttrain.runs.preflight import check_settings
from robusttrain.runs.rerun import Repetition
from robusttrain.runs.resume import Command, as_given
from robusttrain.runs.run_directories import remove_if_untouched
from robusttrain.runs.training_attack import TRAIN_ATTACK, training_attack
from robusttrain.runtime import distributed, signals
from robusttrain.runtime.malloc import keep_freed_memory
from robusttrain.runtime.signals import Interrupted
from robusttrain.sweeps import job as sweep
from robusttrain.sweeps import launchers
from robusttrain.sweeps.session import present

# Overrides for all processes but the first, which alone has the run directory and the log, and for
# dry runs, which have none.
WITHOUT_FILES = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none"]

# An exception that is raised there is one of Hydra, whatever its type.
HYDRA = Path(hydra.__file__).parent

LOST = "another process of this run has ended or does not respond"

# Read before `main` sets the variable itself.
WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"

log = logging.getLogger("robusttrain")


@dataclass(frozen=True)
class Task:
    """The function that Hydra calls for a run, or for each job of a sweep.

    Launchers pickle it, with the command line, for jobs in other processes.

    Parameters
    ----------
    command
        The command line, starting with the name of the program.
    dry
        Whether to estimate what the run costs instead of running.
    """

    command: tuple[str, ...]
    dry: bool = False

    def __call__(self, config: DictConfig) -> float | None:
        """Run once, in the directory that Hydra has created."""
        chosen = HydraConfig.get()
        if chosen.mode == RunMode.MULTIRUN:
            return sweep.job(chosen, config, self._run)
        terminal, started = Terminal(verbosity=config.verbosity), time.perf_counter()
        try:
            if self.dry:
                _estimate(config, chosen, terminal)
                return None
            result = self._run(config, terminal)
        except EXPECTED_ERRORS as error:
            _leave(error)
        if config.resume is not None and distributed.is_main():
            seconds = time.perf_counter() - started
            sweep.finish(Path(chosen.runtime.output_dir), result, seconds)
        if distributed.is_main():
            session = present()
            assert session is not None, "the command line opens it"
            session.exit_code = outcome.exit_code(Path(chosen.runtime.output_dir))
        # Last line, never wrapped, so that it can be copied.
        terminal.say_always(chosen.runtime.output_dir)
        return result

    def _run(self, config: DictConfig, terminal: Terminal) -> float | None:
        chosen = HydraConfig.get()
        run_dir = distributed.broadcast(lambda: Path(chosen.runtime.output_dir))
        words = [f"resume={run_dir}", *Command.of(chosen, self.command[1:]).trust]
        again = f"resume with: {distributed.command()} {shlex.join(words)}"
        try:
            with _without_exit():
                return _run_in(run_dir, config, chosen, self.command, terminal)
        except Interrupted as interrupted:
            # How to resume a whole sweep is printed at its end.
            advice = "" if chosen.mode == RunMode.MULTIRUN else f"; {again}"
            terminal.say_always(f"stopped by {interrupted}{advice}")
            raise
        except EXPECTED_ERRORS as error:
            log.error(explain(error))
            # If the directory is gone or not accessible, the error reports that already.
            with suppress(OSError):
                if distributed.is_main():
                    remove_if_untouched(run_dir, PREAMBLE)
            raise
        except RuntimeError as error:
            if not distributed.is_lost_peer(error):
                raise
            log.error(LOST)
            raise ProcessLostError(f"{LOST}; {again}") from error


def _estimate(config: DictConfig, chosen: HydraConf, terminal: Terminal) -> None:
    refuse_hidden(chosen)
    names, given = _options(chosen, config), as_given(chosen.overrides.task)
    built, origin, without_effect = prepared(config, names, given)
    unread.refuse(without_effect)
    experiment.estimate(built, origin, terminal)


@contextmanager
def _without_exit() -> Iterator[None]:
    """Refuse a component of the user's own that ends the process by `sys.exit`."""
    try:
        yield
    except SystemExit as left:
        place = traceback.extract_tb(left.__traceback__)[-1]
        subject, allowed = f"{place.filename}:{place.lineno}", "raise an error instead"
        problem = f"in {place.name} calls sys.exit({left.code})"
        raise InputError(subject, allowed=allowed, problem=problem) from left


def _run_in(
    run_dir: Path,
    config: DictConfig,
    chosen: HydraConf,
    command: Sequence[str],
    terminal: Terminal,
) -> float | None:
    names = _options(chosen, config)
    refuse_hidden(chosen)
    with alone_in(run_dir) if distributed.is_main() else nullcontext():
        built, origin, without_effect = prepared(config, names, as_given(chosen.overrides.task))
        if chosen.mode == RunMode.RUN and built.resume is None:
            # The settings of all jobs of a sweep are checked together, before the first one.
            unread.refuse(without_effect)
        if built.keep_memory:
            keep_freed_memory()
        repeated = Command.of(chosen, command[1:])
        if built.resume is None and distributed.is_main():
            repeated.write(run_dir)
        origin = origin._replace(overrides=repeated.words, command=command)
        return experiment.run(built, origin, run_dir, terminal)


def main(program: str, given: Sequence[str]) -> ExitCode:
    """Run a command line, and return its exit code.

    Exits with a one-line message on invalid input.

    Parameters
    ----------
    program
        The name of the program.
    given
        The words that the user typed after it.
    """
    schema.register()
    launchers.register()
    # Makes Hydra raise the error, where it would print a shortened traceback and exit.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with (
        distributed.torchrun_group(),
        _only_first_prints(),
        _exit_codes(),
        signals.handle_signals(),
    ):
        dry = DRY_RUN in given
        words = distributed.broadcast(lambda: arguments(given))
        if dry or not distributed.is_main():
            words = [*words, *WITHOUT_FILES]
        with sweep.concluded(_without_effect, given) as session:
            _by_hydra(Task((program, *words), dry))
        return session.exit_code


def _by_hydra(task: Task) -> None:
    """Run `task` through Hydra."""
    decorated = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    # Hydra takes its arguments from sys.argv only; no other code reads it.
    before, sys.argv = sys.argv, list(task.command)
    try:
        with _short_usage(), _refusals_of_hydra():
            decorated(task)()
    finally:
        sys.argv = before


@contextmanager
def _short_usage() -> Iterator[None]:
    """Exit with one line for a wrong option, where argparse would print all of Hydra's options."""

    def refuse(self: ArgumentParser, message: str) -> NoReturn:
        print(f"robusttrain: {message} (see robusttrain --help)", file=sys.stderr)
        sys.exit(ExitCode.usage)

    before, ArgumentParser.error = ArgumentParser.error, refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        ArgumentParser.error = before  # type: ignore[method-assign]


@contextmanager
def _refusals_of_hydra() -> Iterator[None]:
    """Turn plain exceptions that Hydra raises for a command line into `InputError`."""
    try:
        yield
    except UnicodeDecodeError as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        files = [path for frame in frames if (path := frame.f_locals.get("full_path"))]
        if not files:
            raise
        raise InputError(str(files[-1]), problem="is not a text file in UTF-8") from error
    except (ValueError, AssertionError, TypeError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        if isinstance(error, EXPECTED_ERRORS) or HYDRA not in Path(place.filename).parents:
            raise
        required = str(place.line).removeprefix("assert ")
        reason = str(error).partition("\n")[0] or f"Hydra requires {required}"
        raise InputError(reason) from error


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn expected errors and interrupts in the block into exit codes."""
    try:
        yield
    except EXPECTED_ERRORS as error:
        _leave(error)
    except ValueError as error:
        # logging raises this if it cannot open its file, the first that a run writes.
        if not isinstance(error.__cause__, OSError):
            raise
        _leave(error.__cause__)
    except Interrupted as interrupted:
        if distributed.is_lost_peer(interrupted):
            # torchrun terminates all processes when one has ended.
            _leave(ProcessLostError(LOST))
        sys.exit(of_signal(interrupted.signum))
    except RuntimeError as error:
        if not distributed.is_lost_peer(error):
            raise
        _leave(ProcessLostError(LOST))


@contextmanager
def _only_first_prints() -> Iterator[None]:
    """Silence every process but the first; a failure is still reported by each."""
    if distributed.is_main():
        yield
        return
    warnings.simplefilter("ignore")
    # Without a handler, Python would print log records to the standard error.
    log.addHandler(logging.NullHandler())
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


def rerun(program: str, given: Sequence[str]) -> ExitCode:
    """Run `robusttrain rerun RUN`: repeat the run in `RUN-rerun`, and compare the results.

    Returns the exit code of the repetition, or that of a failure if they differ.
    """
    if os.environ.get("RANK", "0") != "0":
        # The first process broadcasts the command, and compares.
        return main(program, [])
    try:
        repetition = Repetition.of(given)
    except InputError as error:
        _leave(error)
    code = main(program, repetition.command)
    differences = repetition.differences()
    for line in differences or [repetition.agreement()]:
        Terminal().say(line)
    return ExitCode.failure if differences else code


def _leave(error: Exception) -> NoReturn:
    """Exit with the message of an expected error, or raise it if HYDRA_FULL_ERROR=1."""
    if WANTS_TRACEBACK:
        raise error
    sys.exit(distributed.exit_message(f"robusttrain: {explain(error)}"))


def _without_effect(composed: DictConfig) -> Mapping[str, InputError]:
    """The refusals of the settings of a job that have no effect, by their keys."""
    config = copy.deepcopy(composed)
    chosen = cast(HydraConf, config.hydra)
    with read_write(config), open_dict(config):
        del config["hydra"]
    return prepared(config, _options(chosen, config), list(chosen.overrides.task)).unread


class Prepared(NamedTuple):
    """A run before any work: its components, and where its configuration comes from.

    `unread` has a refusal for each setting of the command line that has no effect, by its key.
    """

    config: Config
    origin: Origin
    unread: Mapping[str, InputError]


def prepared(config: DictConfig, names: Mapping[str, str], overrides: Sequence[str]) -> Prepared:
    """Build every component, and describe where the configuration comes from.

    Parameters
    ----------
    config
        The configuration as Hydra composed it.
    names
        The chosen option of each group.
    overrides
        The overrides that the user gave.

    Raises
    ------
    InputError
        If a value is not allowed, or `checkpoint` cannot be used.
    """
    config = copy.deepcopy(config)
    OmegaConf.set_struct(config, False)
    trained = None
    if config.checkpoint is not None:
        config, others, trained = inherit_config(config, overrides)
        names = {**names, **others}
    refuse_unknown_keys(config, overrides)
    config = configs.with_numbers(config)
    # A model that is already an `nn.Module` is initialised when it is built.
    torch.manual_seed(seeding.derived_seed(config.seed, "initialisation"))
    plain = cast("dict[str, Any]", OmegaConf.to_container(config, resolve=False, enum_to_str=True))
    # A resumed run has the configuration of the run that was interrupted.
    plain["resume"] = None
    # The same run may print more or less.
    del plain["verbosity"]
    built = configs.build(config)
    check_settings(built)
    # The names in a checkpoint are more reliable than those derived from its configuration.
    names = {TRAIN_ATTACK: training_attack(built, plain, names), **names}
    if built.resume is None:
        unread.refuse_without_effect(built, plain, names)
    origin = Origin(plain, names, trained=trained)
    return Prepared(built, origin, unread.unread(built, plain, names, overrides))


def _options(chosen: HydraConf, config: DictConfig) -> dict[str, str]:
    """The option of each group; for a stack of noises, those of its mechanisms, in order."""
    choices = {key: str(value) for key, value in chosen.runtime.choices.items()}
    mechanisms = config.noise.get("mechanisms")
    names = map(str, mechanisms) if isinstance(mechanisms, DictConfig) else ()
    stacked = [f"noise@noise.mechanisms.{name}" for name in names]
    options = [choices[group] for group in stacked if group in choices]
    return {**choices, "noise": "+".join(options)} if options else choices
