"""What all stages of a run share."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from omegaconf import OmegaConf, resolvers
from torch import Tensor

from robusttrain.config.run_config import Config, Stage
from robusttrain.config.schema import GROUPS
from robusttrain.data import Info
from robusttrain.loggers import flattened
from robusttrain.report.terminal import Terminal


class Origin(NamedTuple):
    """Where a run comes from: its configuration as containers, and the option of each group.

    `overrides` are the arguments that set this configuration. `command` is the command line of the
    process, starting with the name of the program. `trained` describes the training of a model that
    is only evaluated.
    """

    config: dict[str, Any]
    names: Mapping[str, str]
    overrides: Sequence[str] = ()
    command: Sequence[str] = ()
    trained: Mapping[str, Any] | None = None

    def resolved(self) -> dict[str, Any]:
        """The configuration with every reference replaced by its value.

        References to environment variables stay, which may hold secrets: files are shared.
        """
        with _environment_unread():
            resolved: Any = OmegaConf.to_container(OmegaConf.create(self.config), resolve=True)
        return cast("dict[str, Any]", resolved)

    def parameters(self) -> dict[str, Any]:
        """The chosen option of each group, and all values by their full keys, for a logger."""
        options = {group: self.names[group] for group in GROUPS if group in self.names}
        return options | flattened(self.resolved())


@contextmanager
def _environment_unread() -> Iterator[None]:
    """Let `${oc.env:NAME}` stand for itself in the block."""
    OmegaConf.register_new_resolver(
        "oc.env", lambda *words: f"${{oc.env:{','.join(map(str, words))}}}", replace=True
    )
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", resolvers.oc.env, replace=True)


@dataclass(frozen=True)
class RunContext:
    """A run: its configuration, data set, device, directory and terminal.

    Parameters
    ----------
    config
        The configuration, with every component built. It is never modified.
    origin
        The same configuration as plain containers, to be written to files.
    info
        The images and classes of the data set.
    device
        The device that computes.
    run_dir
        The directory for results.
    terminal
        The terminal for messages and tables.
    """

    config: Config
    origin: Origin
    info: Info
    device: torch.device
    run_dir: Path
    terminal: Terminal

    def located(self, positions: Tensor) -> "RunContext":
        """The same run, with the images to evaluate as rows of its test set.

        `positions` are those of its images in the data set as published, int64 (N,).

        Raises
        ------
        InputError
            If images are to be evaluated that are not in the test set.
        """
        evaluation = self.config.evaluation.located(positions)
        return replace(self, config=replace(self.config, evaluation=evaluation))

    @property
    def trains(self) -> bool:
        """Whether the run trains its model."""
        return Stage.train in self.config.stages

    @property
    def evaluates(self) -> bool:
        """Whether the run evaluates its model."""
        return Stage.evaluate in self.config.stages
