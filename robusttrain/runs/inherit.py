"""What a run inherits from the configuration of its checkpoint."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from robusttrain.checkpoints import checkpoint as checkpoints
from robusttrain.checkpoints import external
from robusttrain.checkpoints.initial_weights import KEY, InitialWeights
from robusttrain.config.build import with_numbers
from robusttrain.config.error_messages import no_such_key, wrong_type
from robusttrain.config.model_section import OF_EVERY_MODEL, OF_WEIGHTS
from robusttrain.config.run_config import Stage
from robusttrain.config.schema import COMPANIONS, schema_of
from robusttrain.config.unread import destination
from robusttrain.errors import InputError
from robusttrain.loggers import flattened
from robusttrain.runs.training_attack import OWN_ATTACK, TRAIN_ATTACK, UNKNOWN
from robusttrain.runs.trust import refuse_untrusted

# Keys that a run takes from its checkpoint, unless the command line sets them.
INHERITED = ("dataset", "attack", "defense", "model", "noise", "norm", "eps", "seed", "data_dir")

# The same, of checkpoints that have them; earlier versions had a single threat model, which `norm`
# and `eps` replace.
NEWER = {"threats": ("norm", "eps")}

# Keys that only describe a training. They cannot be changed for a model that is already trained.
OF_TRAINING = (
    "attack", "defense", *COMPANIONS, "optimizer", "schedule", "training", "epochs", "batch_size",
)  # fmt: skip

# Keys that describe a trained model, in the order of reports. Where its data lie does not.
DESCRIBING = tuple(
    dict.fromkeys(
        ("dataset", "model", "defense", *OF_TRAINING, "noise", "norm", "eps", "threats", "seed")
    )
)

# Keys that are chosen for a data set, and inherited with it.
LENGTH = ("epochs", "batch_size")

TARGET = "_target_"

# How Hydra is told to accept keys that the option of the command line does not have.
FORCED = "++"

# The growth of the training attack, which is part of its name in reports.
GROWTH = "training.curriculum.steps"


class Inherited(NamedTuple):
    """A configuration that was completed from a checkpoint.

    `names` are the options, by group, that reports name in place of those of the command line.
    `trained` is the training of a model that is only evaluated, as `described` returns it.
    """

    config: DictConfig
    names: dict[str, str]
    trained: dict[str, Any] | None = None


def inherit_config(config: DictConfig, overrides: Sequence[str]) -> Inherited:
    """Complete `config` from its `checkpoint`, except for what the command line sets.

    A model from another tool has no configuration, so that of the command line holds. Only the
    defense that it was trained with stays unknown.

    Raises
    ------
    InputError
        If the checkpoint cannot be read, its configuration names an untrusted class or function, or
        it is only evaluated and the command line describes another training than it had.
    """
    if config.model.get("weights") is not None:
        problem = f"cannot be given with checkpoint={config.checkpoint}"
        allowed = "leave one out: a checkpoint brings its model and its weights"
        raise InputError(KEY, config.model.weights, allowed, problem)
    given = external.load(config.checkpoint, config.trust)
    trains = Stage.train in config.stages
    if isinstance(given, checkpoints.Checkpoint):
        checkpoints.refuse_incomplete(given, (*INHERITED, "training"), config.checkpoint)
        inherit = _to_train_on if trains else _to_evaluate
        return inherit(config, given, overrides)
    found = Inherited(config, {}) if trains else _foreign(config, overrides)
    if isinstance(given, external.ExportedProgram):
        found.names["model"] = given.name
    return found


def describe_weights(config: DictConfig, overrides: Sequence[str]) -> Inherited:
    """A run that evaluates the model of `config` with `model.weights`, as reports describe it.

    Raises
    ------
    InputError
        If the weights cannot be read.
    """
    given = InitialWeights(**{key: config.model[key] for key in OF_WEIGHTS}).read(config.trust)
    if isinstance(given, checkpoints.Checkpoint):
        names = _named(given, ["defense", *COMPANIONS, OWN_ATTACK, TRAIN_ATTACK])
        return Inherited(config, names, described(given))
    return _foreign(config, overrides)


def _foreign(config: DictConfig, overrides: Sequence[str]) -> Inherited:
    """A run that evaluates a model of which nothing is known but its weights."""
    chosen = {destination(override) for override in overrides}
    trained = {} if "defense" in chosen else {"defense": "foreign"}
    return Inherited(config, {TRAIN_ATTACK: UNKNOWN, **trained}, trained or None)


def _to_train_on(
    config: DictConfig, saved: checkpoints.Checkpoint, overrides: Sequence[str]
) -> Inherited:
    """The configuration of a run that trains `saved` further."""
    composed, inherited = with_saved_config(config, saved, overrides)
    given = {destination(override) for override in overrides}
    if "dataset" in inherited and "experiment" not in given:
        # The length that was composed is that of another data set.
        for key in LENGTH:
            if key not in given:
                _take(composed, saved, key)
    return Inherited(composed, _named(saved, inherited))


def _to_evaluate(
    config: DictConfig, saved: checkpoints.Checkpoint, overrides: Sequence[str]
) -> Inherited:
    """The configuration of a run that evaluates `saved`, with the training that is saved there."""
    of_training = [word for word in overrides if _part(word) in OF_TRAINING]
    refuse_unknown_keys(OmegaConf.create(saved.config), of_training)
    refuse_other_training(config, saved, overrides)
    own = [word for word in overrides if word not in of_training]
    composed, inherited = with_saved_config(config, saved, own)
    # These keys may belong to another option than that of this command line.
    for part in {_part(word) for word in of_training if word.startswith(FORCED)} - {*inherited}:
        _take(composed, saved, part)
    _take(composed, saved, GROWTH)
    names = _named(saved, [*inherited, *COMPANIONS, OWN_ATTACK, TRAIN_ATTACK])
    return Inherited(composed, names, described(saved))


def described(saved: checkpoints.Checkpoint) -> dict[str, Any]:
    """What describes the training of a checkpoint: the option of each group, and values by key.

    References stay, so that a value which others refer to is there once.
    """
    config = {key: saved.config[key] for key in DESCRIBING if key in saved.config}
    return _named(saved, DESCRIBING) | flattened(config)


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
        key = destination(override)
        if _part(override) not in OF_TRAINING:
            continue
        if word in saved.names:
            ours, theirs = value, saved.names[word]
        else:
            ours, theirs = _value(today, key), _value(before, key)
        if ours != theirs:
            problem = "differs from the training of the checkpoint"
            raise InputError(word, value, f"it had {word}={theirs}", problem)


def _part(override: str) -> str:
    """The component, or the key of the run, that an override sets or is inside of."""
    return destination(override).partition(".")[0]


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
        If the saved run names a class or function that is not trusted (`refuse_untrusted`).
    """
    keys = {destination(override) for override in overridden}
    # An option of defense chooses its training attack, too.
    chosen = keys | {"attack"} if "defense" in keys else keys
    inherited = [key for key in INHERITED if key not in chosen]
    inherited += [
        key
        for key, instead in NEWER.items()
        if key in saved.config and chosen.isdisjoint({key, *instead})
    ]
    composed = copy.deepcopy(config)
    for key in inherited:
        _take(composed, saved, key)
    # A key inside a component does not replace the component: it is set on the inherited one.
    for key in keys:
        if key.partition(".")[0] in inherited and "." in key:
            value = OmegaConf.select(config, key)
            OmegaConf.update(composed, key, value, merge=False, force_add=True)
    return composed, inherited


def _take(composed: DictConfig, saved: checkpoints.Checkpoint, key: str) -> None:
    """Set `key` to its saved value, in place."""
    value: Any = saved.config
    for name in key.split("."):
        value = value[name]
    refuse_untrusted(value, composed.trust)
    if key == "model":
        # The checkpoint has the weights.
        value = {name: below for name, below in value.items() if name not in OF_WEIGHTS}
    OmegaConf.update(composed, key, value, merge=False, force_add=True)


def refuse_unknown_keys(config: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse keys that the components of `config` do not have, and values of another type.

    Hydra has checked keys without `++` already. Values get the type of their key, in place.

    Raises
    ------
    InputError
        If one of the `overrides` sets such a key or value.
    """
    for override in overrides:
        key = destination(override)
        if override.startswith(FORCED) and "." in key:
            _check_key(config, override.lstrip("+"), key)


def _check_key(config: DictConfig, word: str, key: str) -> None:
    section, *names = key.split(".")
    node = config.get(section)
    for name in names:
        if not OmegaConf.is_dict(node):
            raise no_such_key(word, f"{section}.{name}", [])
        known = schema_of(node.get("_target_"))
        if known is not None:
            fields = [field.name for field in dataclasses.fields(known) if field.name != TARGET]
            shared = OF_EVERY_MODEL if section == "model" else ()
            if name not in (*fields, *shared):
                raise no_such_key(word, f"{section}.{name}", [*fields, *shared])
            if name not in fields:
                return
            _convert(node, name, known, word)
        section, node = f"{section}.{name}", node.get(name)


def _convert(node: DictConfig, name: str, known: type, word: str) -> None:
    """Give the value of a component's field the type of that field."""
    if name not in node or OmegaConf.is_interpolation(node, name) or TARGET in str(node[name]):
        return
    typed = OmegaConf.structured(known)
    try:
        typed[name] = node[name]
    except OmegaConfBaseException as error:
        raise wrong_type(word, error) from error
    node[name] = typed[name]
