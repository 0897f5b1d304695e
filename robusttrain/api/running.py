"""Run an experiment in a Python program, and read finished runs."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn

from robusttrain import ranges
from robusttrain.api import task
from robusttrain.api.arguments import arguments
from robusttrain.api.composition import hydra_started, plain_errors
from robusttrain.api.isolation import isolated, program_terminal
from robusttrain.errors import InputError
from robusttrain.report.files import read_arrays, read_csv, read_json
from robusttrain.report.identity import refuse_mixed, warn_if_unfinished
from robusttrain.report.ledger import CURVE_COLUMNS
from robusttrain.report.result import Result
from robusttrain.report.terminal import Terminal
from robusttrain.run_directory import (
    ADVERSARIAL,
    AUDIT,
    BEST,
    CERTIFIED,
    CURVE,
    GALLERY,
    LATEST,
    LOG,
    MANIFEST,
    RADII,
    REPORT,
    SAMPLES,
    TABLES,
    TRAIN,
)
from robusttrain.runs.resume import quoted
from robusttrain.runs.saved_model import load_model
from robusttrain.runtime import signals
from robusttrain.runtime.log_file import LogFile
from robusttrain.sweeps import session

# Unless the caller says otherwise: it would apply to the whole process.
OF_A_LIBRARY = "keep_memory=false"

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


@dataclass(frozen=True, eq=False, repr=False)
class Run(Result):
    """A finished run: what it found, how it was trained, its model and its configuration.

    Parameters
    ----------
    path
        Its directory.
    training
        A row for each epoch; empty if nothing was trained: `train.csv`.
    trust
        See `load_model`.

    Attributes
    ----------
    model
        The trained model, in eval mode, from images in [0, 1] to logits. It is loaded on first use.
    config
        The configuration of the run, with all references replaced by their values.
    provenance
        The content of `manifest.json`.
    """

    path: Path = Path()
    training: pd.DataFrame = field(default_factory=pd.DataFrame)
    trust: Sequence[str] = ()

    @cached_property
    def model(self) -> nn.Module:
        """The trained model; raises `InputError` if the directory has none."""
        return load_model(self.path, trust=self.trust)

    @cached_property
    def config(self) -> DictConfig:
        """The configuration; raises `InputError` if the run has not finished."""
        if "configuration" not in self.provenance:
            raise InputError(str(self.path), problem=f"has no configuration in {MANIFEST}")
        return OmegaConf.create(dict(self.provenance["configuration"]))

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        yield self.path

    def __str__(self) -> str:
        figures = super().__str__() if len(self.table) else "nothing was evaluated"
        return f"{figures}\n{self.path}"


def run(*words: str, progress: bool = True) -> Run:
    """Train and evaluate, as `robusttrain` does with the same words; returns the finished run.

    Its files go to `outputs/` below the current directory, or to `hydra.run.dir=`. Ctrl+C writes a
    checkpoint first; `rt.run("resume=DIR")` resumes it. Global random streams, settings of torch,
    handlers of signals and the configuration of logging are afterwards as they were. Freed memory
    is not kept, unless `keep_memory=true` is given. Requirements that are not met raise nothing:
    `result.json` has them.

    Parameters
    ----------
    words
        Words of the command line, such as `defense=trades`. For its options, such as `-m` for a
        sweep, use the command line.
    progress
        Whether bars and figures are printed, on the standard error; warnings always are.

    Raises
    ------
    InputError
        If a word is not allowed, with the message of the command line; before any work.
    NonFiniteLossError
        If training diverges; the files of earlier epochs stay.

    Examples
    --------
    >>> import robusttrain as rt
    >>> folder = getfixture("tmp_path")
    >>> run = rt.run("experiment=smoke", f"hydra.run.dir={folder}", progress=False)
    >>> run.table["attack"].iloc[-1]
    'worst_case'
    >>> run.config.defense.attack.steps
    10
    """
    for word in words:
        allowed = "a setting, such as eps=0.1; options are for the command line"
        ranges.require(not word.startswith("-"), "word", word, allowed)
    given = words if any(word.startswith("resume=") for word in words) else (OF_A_LIBRARY, *words)
    call = _Call(("robusttrain", *given), program_terminal(progress))
    with (
        isolated(),
        plain_errors(),
        signals.handle_signals(),
        session.opened(task.without_effect),
        hydra_started(),
        _exits_refused(),
    ):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None, "it was started"
        name, overrides = _of_hydra(arguments(given))
        hydra.run(name, call, overrides, with_log_configuration=False)
        if call.error is not None:
            raise call.error
    assert call.folder is not None, "Hydra has called it"
    return load_run(call.folder)


def _of_hydra(words: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the configuration, and the overrides; a resumed run has options of Hydra, too."""
    options = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--"))
    overrides = [word for word in words if not word.startswith("--")]
    if "config-dir" in options:
        overrides.append(f"hydra.searchpath=[{quoted('file://' + options['config-dir'])}]")
    return options.get("config-name", "config"), overrides


class _Call:
    """The function that Hydra calls; it keeps an error, about which Hydra would print a line."""

    def __init__(self, command: Sequence[str], terminal: Terminal) -> None:
        self.command, self.terminal = command, terminal
        self.folder: Path | None = None
        self.error: Exception | None = None

    def __call__(self, config: DictConfig) -> None:
        chosen = HydraConfig.get()
        self.folder = Path(chosen.runtime.output_dir)
        try:
            with _logged(self.folder):
                task.run(chosen, config, self.command, self.terminal)
        except Exception as error:
            self.error = error


@contextmanager
def _exits_refused() -> Iterator[None]:
    """Raise an error for an exit with a message, by which a callback of Hydra refuses."""
    try:
        yield
    except SystemExit as left:
        raise InputError(str(left.code).removeprefix("robusttrain: ")) from left


@contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """Write the log of the run in the block, and leave the loggers as they were."""
    log, handler = logging.getLogger("robusttrain"), LogFile(folder / LOG)
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    level, propagates = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.propagate = propagates
        log.setLevel(level)
        log.removeHandler(handler)
        handler.close()


def load_run(path: Path | str, *, trust: Sequence[str] = ()) -> Run:
    """A run, or a saved result, from its directory.

    Parameters
    ----------
    path
        The directory.
    trust
        Packages other than robusttrain whose classes and functions the configuration of the model
        may call; see `load_model`.

    Raises
    ------
    InputError
        If the directory has no results, or damaged ones, or those of several runs.

    Examples
    --------
    >>> import torch
    >>> import robusttrain as rt
    >>> x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8))
    >>> words = ["evaluation.audit=false"]
    >>> result = rt.evaluate(
    ...     model, x, y, eps=0.1, evaluation="quick", overrides=words, progress=False
    ... )
    >>> folder = result.save(getfixture("tmp_path"))
    >>> rt.load_run(folder).samples.columns[:3].tolist()
    ['index', 'index_in', 'label']
    """
    folder = Path(path)
    if not any((folder / name).is_file() for name in (*TABLES, BEST, LATEST)):
        problem = "is not the directory of a run"
        raise InputError("run", path, f"it has none of {', '.join(TABLES)}", problem)
    warn_if_unfinished(folder)
    refuse_mixed(folder, TABLES)
    return Run(
        table=read_csv(folder / REPORT),
        samples=read_csv(folder / SAMPLES),
        audit=read_csv(folder / AUDIT, ("check", "figure", "threshold", "verdict")),
        curve=read_csv(folder / CURVE, CURVE_COLUMNS),
        certified=read_csv(folder / CERTIFIED),
        radii=read_csv(folder / RADII),
        adversarial=read_arrays(folder / ADVERSARIAL),
        gallery=read_arrays(folder / GALLERY),
        provenance=read_json(folder / MANIFEST),
        path=folder,
        training=read_csv(folder / TRAIN),
        trust=trust,
    )
