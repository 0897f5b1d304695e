"""Compose configurations within a Python program, which may be a Hydra application itself."""

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from hydra import compose, initialize_config_dir, version
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from robusttrain.api import task
from robusttrain.config import schema
from robusttrain.config.error_messages import explain
from robusttrain.config.folders import CONF
from robusttrain.errors import InputError
from robusttrain.sweeps import launchers

VERSION_BASE = "1.3"


@contextmanager
def hydra_started() -> Iterator[None]:
    """Start Hydra with the configuration of robusttrain for the block.

    A Hydra application of the caller's own continues after it as before.
    """
    schema.register()
    launchers.register()
    before, base = GlobalHydra.instance(), version.VersionBase.instance().getbase()
    GlobalHydra.set_instance(_another())
    try:
        with initialize_config_dir(str(CONF), job_name="robusttrain", version_base=VERSION_BASE):
            yield
    finally:
        GlobalHydra.set_instance(before)
        version.VersionBase.instance().version_base = base


def composed(words: Sequence[str], **values: object) -> tuple[DictConfig, dict[str, str]]:
    """The configuration that `words` of the command line choose, with other `values` by their keys.

    Returns the configuration, and the chosen option of each group.

    Raises
    ------
    InputError
        If Hydra or OmegaConf refuses a word; the message is that of the command line.
    """
    with plain_errors():
        config = copy.deepcopy(_composed(tuple(words)))
    names = task.options(cast(HydraConf, config.hydra), config)
    with open_dict(config):
        del config["hydra"]
        config.update(values)
    return config, names


# A program may evaluate in a loop, and composing takes almost a second.
@functools.lru_cache
def _composed(words: tuple[str, ...]) -> DictConfig:
    with hydra_started():
        return compose("config", list(words), return_hydra_config=True)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn errors of Hydra and OmegaConf into `InputError`, with the text of the command line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise InputError(explain(error)) from error


def _another() -> GlobalHydra:
    """A second instance of a class that otherwise returns its first."""
    instance = object.__new__(GlobalHydra)
    instance.clear()
    return instance
