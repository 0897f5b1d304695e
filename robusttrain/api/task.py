"""A run of the command line, after Hydra has composed its configuration."""

import copy
import logging
import shlex
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from hydra.conf import HydraConf
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from robusttrain import seeding
from robusttrain.config import build as configs
from robusttrain.config import unread
from robusttrain.config.error_messages import EXPECTED_ERRORS, explain
from robusttrain.config.run_config import Config, Stage
from robusttrain.config.several_threats import with_own_threat
from robusttrain.errors import InputError, ProcessLostError
from robusttrain.report.page import Page
from robusttrain.report.terminal import Terminal
from robusttrain.report.verbosity import Verbosity
from robusttrain.run_directory import PREAMBLE
from robusttrain.runs import experiment, outcome
from robusttrain.runs.context import Origin
from robusttrain.runs.hidden import refuse_hidden
from robusttrain.runs.inherit import describe_weights, inherit_config, refuse_unknown_keys
from robusttrain.runs.lock import alone_in
from robusttrain.runs.preflight import check_settings
from robusttrain.runs.resume import Command, as_given
from robusttrain.runs.run_directories import remove_if_untouched
from robusttrain.runs.training_attack import TRAIN_ATTACK, training_attack
from robusttrain.runtime import distributed
from robusttrain.runtime.distributed import LOST
from robusttrain.runtime.malloc import keep_freed_memory
from robusttrain.runtime.signals import Interrupted
from robusttrain.sweeps import job as sweep
from robusttrain.sweeps.session import present

log = logging.getLogger("robusttrain")


def run(
    chosen: HydraConf, config: DictConfig, command: Sequence[str], terminal: Terminal | None = None
) -> float | None:
    """Run once, and return the figure of the run.

    Parameters
    ----------
    chosen, config
        Hydra's part of the configuration, and the user's.
    command
        The command line, starting with the name of the program.
    terminal
        The terminal; the standard output if not given.
    """
    started = time.perf_counter()
    terminal = terminal or Terminal(verbosity=Verbosity(config.verbosity))
    result = _run(chosen, config, command, terminal)
    if config.resume is not None and distributed.is_main():
        seconds = time.perf_counter() - started
        sweep.finish(Path(chosen.runtime.output_dir), result, seconds)
    if distributed.is_main():
        session = present()
        assert session is not None, "the command line opens it"
        run_dir = Path(chosen.runtime.output_dir)
        session.exit_code = outcome.exit_code(run_dir)
        if config.report == Page.html:
            terminal.say(f"report: {page_of(run_dir)}")
    # Last line, never wrapped, so that it can be copied.
    terminal.say_always(chosen.runtime.output_dir)
    return result


def page_of(run_dir: Path) -> Path:
    """Write the page of a run, and return where it is."""
    fonts = logging.getLogger("matplotlib.font_manager")
    level = fonts.level
    # The first import on a machine takes seconds, which it announces.
    fonts.setLevel(logging.ERROR)
    # Imported here, since few processes need matplotlib and it takes long.
    from robusttrain.report.run.page import write_page

    fonts.setLevel(level)
    return write_page(run_dir)


def estimate(chosen: HydraConf, config: DictConfig) -> None:
    """Print what the run would cost; the arguments are those of `run`."""
    refuse_hidden(chosen)
    names, given = options(chosen, config), as_given(chosen.overrides.task)
    built, origin, ineffective = prepared(config, names, given)
    unread.refuse(ineffective)
    experiment.estimate(built, origin, Terminal(verbosity=Verbosity(config.verbosity)))


def run_job(chosen: HydraConf, config: DictConfig, command: Sequence[str]) -> float | None:
    """Run a job of the current sweep; the arguments are those of `run`."""
    return sweep.job(chosen, config, lambda c, terminal: _run(chosen, c, command, terminal))


def _run(
    chosen: HydraConf, config: DictConfig, command: Sequence[str], terminal: Terminal
) -> float | None:
    run_dir = distributed.broadcast(lambda: Path(chosen.runtime.output_dir))
    words = [f"resume={run_dir}", *Command.of(chosen, command[1:]).trust]
    again = f"resume with: {distributed.command()} {shlex.join(words)}"
    try:
        return _ended(run_dir, config, chosen, command, terminal, again)
    except Interrupted as interrupted:
        # How to resume a whole sweep is printed at its end.
        advice = "" if chosen.mode == RunMode.MULTIRUN else f"; {again}"
        terminal.say_always(f"stopped by {interrupted}{advice}")
        raise


def _ended(
    run_dir: Path,
    config: DictConfig,
    chosen: HydraConf,
    command: Sequence[str],
    terminal: Terminal,
    again: str,
) -> float | None:
    """The figure of the run; errors are logged, and tell how to resume if a process is lost."""
    try:
        with _without_exit():
            return _run_in(run_dir, config, chosen, command, terminal)
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
    names = options(chosen, config)
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


def without_effect(composed: DictConfig) -> Mapping[str, InputError]:
    """The refusals of the settings of a job that have no effect, by their keys."""
    config = copy.deepcopy(composed)
    chosen = cast(HydraConf, config.hydra)
    with read_write(config), open_dict(config):
        del config["hydra"]
    return prepared(config, options(chosen, config), list(chosen.overrides.task)).unread


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
    elif config.model.get("weights") is not None and Stage.train not in config.stages:
        config, others, trained = describe_weights(config, overrides)
        names = {**names, **others}
    return assembled(config, names, overrides, trained)


def assembled(
    config: DictConfig,
    names: Mapping[str, str],
    overrides: Sequence[str],
    trained: Mapping[str, Any] | None = None,
) -> Prepared:
    """Build every component of a whole configuration; see `prepared`.

    `trained` describes the training of a model that is only evaluated.
    """
    refuse_unknown_keys(config, overrides)
    config = with_own_threat(configs.with_numbers(config), overrides)
    # A model that is already an `nn.Module` is initialised when it is built.
    torch.manual_seed(seeding.derived_seed(config.seed, "initialisation"))
    plain = cast("dict[str, Any]", OmegaConf.to_container(config, resolve=False, enum_to_str=True))
    # A resumed run has the configuration of the run that was interrupted.
    plain["resume"] = None
    # The same run may print more or less.
    del plain["verbosity"], plain["report"]
    built = configs.build(config)
    check_settings(built)
    # The names in a checkpoint are more reliable than those derived from its configuration.
    names = {TRAIN_ATTACK: training_attack(built, plain, names), **names}
    if built.resume is None:
        unread.refuse_without_effect(built, plain, names)
    origin = Origin(plain, names, trained=trained)
    return Prepared(built, origin, unread.unread(built, plain, names, overrides))


def options(chosen: HydraConf, config: DictConfig) -> dict[str, str]:
    """The option of each group; for a stack of noises, those of its mechanisms, in order."""
    choices = {key: str(value) for key, value in chosen.runtime.choices.items()}
    mechanisms = config.noise.get("mechanisms")
    names = map(str, mechanisms) if isinstance(mechanisms, DictConfig) else ()
    stacked = [f"noise@noise.mechanisms.{name}" for name in names]
    options = [choices[group] for group in stacked if group in choices]
    return {**choices, "noise": "+".join(options)} if options else choices
