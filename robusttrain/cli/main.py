"""The command line of runs and sweeps: compose the configuration, run, exit with a code.

Nothing here imports torch before the configuration is composed: `task` has what needs it.
"""

import logging
import os
import sys
import traceback
import warnings
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from robusttrain.api.arguments import DRY_RUN, arguments
from robusttrain.cli import own_code
from robusttrain.config import schema
from robusttrain.config.error_messages import EXPECTED_ERRORS, explain
from robusttrain.config.folders import CONF
from robusttrain.config.suggestions import did_you_mean, for_flag
from robusttrain.errors import InputError, ProcessLostError
from robusttrain.exit_codes import ExitCode, of_signal
from robusttrain.runtime import distributed, signals
from robusttrain.runtime.distributed import LOST
from robusttrain.runtime.signals import Interrupted
from robusttrain.sweeps import launchers, session

# Overrides for all processes but the first, which alone has the run directory and the log, and for
# dry runs, which have none.
WITHOUT_FILES = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none"]

# An exception that is raised there is one of Hydra, whatever its type.
HYDRA = Path(hydra.__file__).parent

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
        # Imported here, so that a mistake in the command line does not wait for torch.
        from robusttrain.api import task

        chosen = HydraConfig.get()
        if chosen.mode == RunMode.MULTIRUN:
            return task.run_job(chosen, config, self.command)
        with _own_errors():
            try:
                if self.dry:
                    task.estimate(chosen, config)
                    return None
                return task.run(chosen, config, self.command)
            except EXPECTED_ERRORS as error:
                _leave(error)


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
    own_code.see_current_directory()
    schema.register()
    launchers.register()
    # Makes Hydra raise the error, where it would print a shortened traceback and exit.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with (
        distributed.torchrun_group(),
        _only_first_prints(),
        _own_errors(),
        _exit_codes(),
        signals.handle_signals(),
    ):
        dry = DRY_RUN in given
        words = distributed.broadcast(lambda: arguments(given))
        if dry or not distributed.is_main():
            words = [*words, *WITHOUT_FILES]
        with session.concluded(_without_effect, given) as concluded:
            _by_hydra(Task((program, *words), dry))
        return concluded.exit_code


def _by_hydra(task: Task) -> None:
    """Run `task` through Hydra."""
    decorated = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    # Hydra takes its arguments from sys.argv only; no other code reads it.
    before, sys.argv = sys.argv, list(task.command)
    try:
        with _short_usage(task.command[1:]), _refusals_of_hydra():
            decorated(task)()
    finally:
        sys.argv = before


@contextmanager
def _short_usage(words: Sequence[str]) -> Iterator[None]:
    """Exit with one line for a wrong option, where argparse would print all of Hydra's options."""

    def refuse(self: ArgumentParser, message: str) -> NoReturn:
        flag = message.partition("unrecognized arguments: ")[2].partition(" ")[0]
        meant = did_you_mean(for_flag(flag, words)) or "see robusttrain --help"
        print(f"robusttrain: {message} ({meant})", file=sys.stderr)
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
def _own_errors() -> Iterator[None]:
    """Exit with the user's own frames of an unexpected error, where there are any."""
    try:
        yield
    except Exception as error:
        if WANTS_TRACEBACK or not own_code.own_frames(error):
            raise
        more = "HYDRA_FULL_ERROR=1 shows the whole traceback"
        message = f"robusttrain: your code has failed ({more})\n{own_code.report(error)}"
        sys.exit(distributed.exit_message(message))


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
    from robusttrain.report.terminal import Terminal
    from robusttrain.runs.rerun import Repetition

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
    # torchrun sends one as soon as another process has ended, which may be why this one does.
    signals.ignore()
    message = f"robusttrain: {explain(error)}{own_code.places(error)}"
    sys.exit(distributed.exit_message(message))


def _without_effect(composed: DictConfig) -> Mapping[str, InputError]:
    """The refusals of the settings of a job that have no effect, by their keys."""
    from robusttrain.api import task

    return task.without_effect(composed)
