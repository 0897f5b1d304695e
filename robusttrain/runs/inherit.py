"""Runs that are saved: their model for somebody's own code, their configuration for another run."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf

from robusttrain.checkpoints import checkpoint as checkpoints
from robusttrain.checkpoints import external
from robusttrain.config.run_config import Stage
from robusttrain.config.schema import COMPANIONS
from robusttrain.runs.trust import TRUSTED, refuse_strangers

# What a saved model brings along when it is evaluated again, unless it is given once more.
INHERITED = ("dataset", "attack", "defense", "model", "noise", "norm", "eps", "seed", "data_dir")


class Inherited(NamedTuple):
    """A configuration with what a saved model brings along.

    `names` are the options, by their groups, that reports have to give otherwise than the command
    line does.
    """

    config: DictConfig
    names: dict[str, str]


def inherit_config(config: DictConfig, overrides: Sequence[str]) -> Inherited:
    """`config` with what its `checkpoint` brings along and the command line did not choose.

    A model of somebody else's brings no configuration: that of the command line holds, but nobody
    has said what the model was trained with.

    Raises
    ------
    InputError
        If there is no such checkpoint, or it would build a class that nobody vouches for.
    """
    given = external.load(config.checkpoint)
    trains = Stage.train in config.stages
    if isinstance(given, checkpoints.Checkpoint):
        composed, inherited = with_saved_config(config, given, overrides)
        # A training has the companions of its own command line.
        companions = COMPANIONS if "defense" in inherited and not trains else ()
        told = [*inherited, *companions]
        return Inherited(composed, {key: given.names[key] for key in told if key in given.names})
    chosen = {_destination(override) for override in overrides}
    names = {}
    if not trains and "defense" not in chosen:
        names["defense"] = "foreign"
    if isinstance(given, external.ExportedProgram):
        names["model"] = given.name
    return Inherited(config, names)


def with_saved_config(
    config: DictConfig, saved: checkpoints.Checkpoint, overridden: Sequence[str]
) -> tuple[DictConfig, list[str]]:
    """`config` with what the command line did not choose from a saved run, and the keys of that.

    Raises
    ------
    InputError
        If that would build a class that neither the project nor `trust` vouches for.
    """
    keys = {_destination(override) for override in overridden}
    # An option of defense chooses the attack that it trains with, too.
    chosen = keys | {"attack"} if "defense" in keys else keys
    inherited = [key for key in INHERITED if key not in chosen]
    composed = copy.deepcopy(config)
    for key in inherited:
        refuse_strangers(saved.config[key], [*TRUSTED, *config.trust])
        OmegaConf.update(composed, key, saved.config[key], merge=False, force_add=True)
    # A key inside of a part does not choose the part: it is set on what was inherited.
    for key in keys:
        if key.partition(".")[0] in inherited and "." in key:
            value = OmegaConf.select(config, key)
            OmegaConf.update(composed, key, value, merge=False, force_add=True)
    return composed, inherited


def _destination(override: str) -> str:
    """The key that an override sets: in `+attack@evaluation.attacks.strong=pgd`, behind the @."""
    return override.lstrip("+~").partition("=")[0].rpartition("@")[2]
