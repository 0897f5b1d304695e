"""What a run inherits from the configuration of its checkpoint."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf

from robusttrain.checkpoints import checkpoint as checkpoints
from robusttrain.checkpoints import external
from robusttrain.config.run_config import Stage
from robusttrain.config.schema import COMPANIONS
from robusttrain.runs.trust import TRUSTED, refuse_untrusted

# Keys that a run takes from its checkpoint, unless the command line sets them.
INHERITED = ("dataset", "attack", "defense", "model", "noise", "norm", "eps", "seed", "data_dir")


class Inherited(NamedTuple):
    """A configuration that was completed from a checkpoint.

    `names` are the options, by group, that reports name in place of those of the command line.
    """

    config: DictConfig
    names: dict[str, str]


def inherit_config(config: DictConfig, overrides: Sequence[str]) -> Inherited:
    """Complete `config` from its `checkpoint`, except for what the command line sets.

    A model from another tool has no configuration, so that of the command line holds. Only the
    defense that it was trained with stays unknown.

    Raises
    ------
    InputError
        If the checkpoint cannot be read, or its configuration names an untrusted class.
    """
    given = external.load(config.checkpoint)
    trains = Stage.train in config.stages
    if isinstance(given, checkpoints.Checkpoint):
        composed, inherited = with_saved_config(config, given, overrides)
        # A new training takes weight perturbation and averaging from its own command line.
        companions = COMPANIONS if "defense" in inherited and not trains else ()
        named = [*inherited, *companions]
        return Inherited(composed, {key: given.names[key] for key in named if key in given.names})
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
    """`config` with the values of a saved run that the command line does not set; and their keys.

    Raises
    ------
    InputError
        If the saved run names a class that is neither of robusttrain nor of a package in `trust`.
    """
    keys = {_destination(override) for override in overridden}
    # An option of defense chooses its training attack, too.
    chosen = keys | {"attack"} if "defense" in keys else keys
    inherited = [key for key in INHERITED if key not in chosen]
    composed = copy.deepcopy(config)
    for key in inherited:
        refuse_untrusted(saved.config[key], [*TRUSTED, *config.trust])
        OmegaConf.update(composed, key, saved.config[key], merge=False, force_add=True)
    # A key inside a component does not replace the component: it is set on the inherited one.
    for key in keys:
        if key.partition(".")[0] in inherited and "." in key:
            value = OmegaConf.select(config, key)
            OmegaConf.update(composed, key, value, merge=False, force_add=True)
    return composed, inherited


def _destination(override: str) -> str:
    """The key that an override sets; in `attack@evaluation.attacks.pgd=pgd20` it follows the @."""
    return override.lstrip("+~").partition("=")[0].rpartition("@")[2]
