"""What a run inherits from the configuration of its checkpoint."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from robusttrain.checkpoints import checkpoint as checkpoints
from robusttrain.checkpoints import external
from robusttrain.config.build import with_numbers
from robusttrain.config.run_config import Stage
from robusttrain.config.schema import COMPANIONS
from robusttrain.errors import InputError
from robusttrain.runs.training_attack import OWN_ATTACK, TRAIN_ATTACK, UNKNOWN
from robusttrain.runs.trust import TRUSTED, refuse_untrusted

# Keys that a run takes from its checkpoint, unless the command line sets them.
INHERITED = ("dataset", "attack", "defense", "model", "noise", "norm", "eps", "seed", "data_dir")

# Keys that only describe a training. They cannot be changed for a model that is already trained.
OF_TRAINING = (
    "attack", "defense", *COMPANIONS, "optimizer", "schedule", "training", "epochs", "batch_size",
)  # fmt: skip

# The growth of the training attack, which is part of its name in reports.
GROWTH = "training.curriculum.steps"


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
        If the checkpoint cannot be read, its configuration names an untrusted class, or it is only
        evaluated and the command line describes another training than it had.
    """
    given = external.load(config.checkpoint)
    trains = Stage.train in config.stages
    if isinstance(given, checkpoints.Checkpoint):
        checkpoints.refuse_incomplete(given, (*INHERITED, "training"), config.checkpoint)
        inherit = _to_train_on if trains else _to_evaluate
        return inherit(config, given, overrides)
    chosen = {_destination(override) for override in overrides}
    names = {}
    if not trains:
        names[TRAIN_ATTACK] = UNKNOWN
    if not trains and "defense" not in chosen:
        names["defense"] = "foreign"
    if isinstance(given, external.ExportedProgram):
        names["model"] = given.name
    return Inherited(config, names)


def _to_train_on(
    config: DictConfig, saved: checkpoints.Checkpoint, overrides: Sequence[str]
) -> Inherited:
    """The configuration of a run that trains `saved` further."""
    composed, inherited = with_saved_config(config, saved, overrides)
    return Inherited(composed, _named(saved, inherited))


def _to_evaluate(
    config: DictConfig, saved: checkpoints.Checkpoint, overrides: Sequence[str]
) -> Inherited:
    """The configuration of a run that evaluates `saved`, with the training that is saved there."""
    refuse_other_training(config, saved, overrides)
    own = [override for override in overrides if not _is_of_training(_destination(override))]
    composed, inherited = with_saved_config(config, saved, own)
    growth = saved.config["training"]["curriculum"]["steps"]
    refuse_untrusted(growth, [*TRUSTED, *config.trust])
    OmegaConf.update(composed, GROWTH, growth, merge=False, force_add=True)
    return Inherited(composed, _named(saved, [*inherited, *COMPANIONS, OWN_ATTACK, TRAIN_ATTACK]))


def _named(saved: checkpoints.Checkpoint, keys: Sequence[str]) -> dict[str, str]:
    return {key: saved.names[key] for key in keys if key in saved.names}


def refuse_other_training(
    config: DictConfig, saved: checkpoints.Checkpoint, overrides: Sequence[str]
) -> None:
    """Raise `InputError` if `overrides` describe another training than that of `saved`.

    An option is compared by its name, and any other value as a value.
    """
    today, before = with_numbers(config), OmegaConf.create(saved.config)
    for override in overrides:
        word, _, value = override.lstrip("+~").partition("=")
        key = _destination(override)
        if not _is_of_training(key):
            continue
        if word in saved.names:
            ours, theirs = value, saved.names[word]
        else:
            ours, theirs = _value(today, key), _value(before, key)
        if ours != theirs:
            problem = "differs from the training of the checkpoint"
            raise InputError(word, value, f"it had {word}={theirs}", problem)


def _is_of_training(key: str) -> bool:
    return key.partition(".")[0] in OF_TRAINING


def _value(config: DictConfig, key: str) -> Any:
    value = OmegaConf.select(config, key)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


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
