"""Compose configurations within a Python program, which may be a Hydra application itself."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra import compose, initialize_config_dir, version
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

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


def composed(words: Sequence[str]) -> DictConfig:
    """The configuration that `words` of the command line choose, with Hydra's part.

    Raises
    ------
    InputError
        If Hydra or OmegaConf refuses a word; the message is that of the command line.
    """
    with hydra_started(), plain_errors():
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
