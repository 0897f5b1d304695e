"""Runs that are saved: their model for somebody's own code, their configuration for another run."""

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from robusttrain.checkpoints import checkpoint as checkpoints
from robusttrain.checkpoints import external
from robusttrain.config.run_config import Stage
from robusttrain.config.schema import COMPANIONS
from robusttrain.runs.trust import TRUSTED, refuse_strangers

# What a saved model brings along when it is evaluated again, unless it is given once more.
INHERITED = ("dataset", "attack", "defense", "model", "noise", "norm", "eps", "seed", "data_dir")


def take_over(config: DictConfig, overrides: Sequence[str]) -> dict[str, str]:
    """Take from `config.checkpoint` what the command line did not choose, in place.

    Returns the names of options, by their groups, that reports have to give otherwise. A model of
    somebody else's brings no configuration: that of the command line holds, but nobody has said
    what the model was trained with.

    Raises
    ------
    InputError
        If there is no such checkpoint, or it would build a class that nobody vouches for.
    """
    given = external.load(config.checkpoint)
    if isinstance(given, checkpoints.Checkpoint):
        inherited = compose_again(config, given, overrides)
        # A training has the companions of its own command line.
        trained = "defense" in inherited and Stage.train not in config.stages
        told = [*inherited, *(COMPANIONS if trained else ())]
        return {key: given.names[key] for key in told if key in given.names}
    chosen = {_destination(override) for override in overrides}
    names = {}
    if Stage.train not in config.stages and "defense" not in chosen:
        names["defense"] = "foreign"
    if isinstance(given, external.Program):
        names["model"] = given.name
    return names


def compose_again(
    config: DictConfig, saved: checkpoints.Checkpoint, overridden: Sequence[str]
) -> list[str]:
    """Take from a saved run what the command line did not choose, in place; returns the keys.

    Raises
    ------
    InputError
        If that would build a class that neither the project nor `trust` vouches for.
    """
    keys = {_destination(override) for override in overridden}
    # An option of defense chooses the attack that it trains with, too.
    chosen = keys | {"attack"} if "defense" in keys else keys
    inherited = [key for key in INHERITED if key not in chosen]
    inner = {key: OmegaConf.select(config, key) for key in keys if key.partition(".")[2]}
    for key in inherited:
        refuse_strangers(saved.config[key], [*TRUSTED, *config.trust])
        OmegaConf.update(config, key, saved.config[key], merge=False, force_add=True)
    # A key inside of a part does not choose the part: it is set on what was inherited.
    for key, value in inner.items():
        if key.partition(".")[0] in inherited:
            OmegaConf.update(config, key, value, merge=False, force_add=True)
    return inherited


def _destination(override: str) -> str:
    """The key that an override sets: in `+attack@evaluation.attacks.strong=pgd`, behind the @."""
    return override.lstrip("+~").partition("=")[0].rpartition("@")[2]
