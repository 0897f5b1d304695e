"""Refuse a sweep with a setting that has no effect in any of its jobs."""

from collections.abc import Iterator
from itertools import product

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from robusttrain.config.error_messages import EXPECTED_ERRORS
from robusttrain.config.unread import destination, refuse
from robusttrain.errors import InputError
from robusttrain.sweeps.session import Unread

# To compose a job takes a third of a second.
MOST_JOBS = 100


def refuse_unread(config: DictConfig, unread: Unread) -> None:
    """Refuse a setting of the command line that no job of the sweep reads.

    Jobs are composed until each setting has been read by one of them; that is usually the first. A
    sweep is not refused for its first `MOST_JOBS` jobs if it has more.

    Parameters
    ----------
    config
        The configuration of the sweep.
    unread
        Finds the settings of a job that have no effect.

    Raises
    ------
    InputError
        If there is such a setting.
    """
    remaining: dict[str, InputError] | None = None
    for number, words in enumerate(_jobs(config)):
        if number == MOST_JOBS:
            return
        try:
            found = unread(_loader().load_sweep_config(config, words))
        except EXPECTED_ERRORS:
            # Hydra, or the job, will report it.
            return
        remaining = _both(remaining, dict(found), config)
        if not remaining:
            return
    refuse(remaining or {})


def _both(
    before: dict[str, InputError] | None, found: dict[str, InputError], config: DictConfig
) -> dict[str, InputError]:
    """The settings of the command line that neither the jobs `before` nor this one reads."""
    if before is None:
        typed = {destination(word) for word in config.hydra.overrides.task}
        return {key: refusal for key, refusal in found.items() if key in typed}
    return {key: refusal for key, refusal in before.items() if key in found}


def _jobs(config: DictConfig) -> Iterator[list[str]]:
    """The overrides of each job; a search is represented by one value of each range."""
    searched = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=_loader())
    try:
        given = parser.parse_overrides([*searched, *config.hydra.overrides.task])
    except HydraException:
        return
    words = {one.get_key_element(): list(_words(one)) for one in given}
    for job in product(*words.values()):
        yield list(job)


def _words(override: Override) -> Iterator[str]:
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep):
        yield f"{key}={value.start}"
    elif override.is_sweep_override():
        yield from (f"{key}={text}" for text in override.sweep_string_iterator())
    else:
        yield override.input_line or f"{key}={override.get_value_element_as_str()}"


def _loader() -> ConfigLoader:
    return GlobalHydra.instance().config_loader()
