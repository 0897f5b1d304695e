"""Runs that are saved: their model for somebody's own code, their configuration for another run."""

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from robusttrain.checkpoints import checkpoint as checkpoints
from robusttrain.checkpoints import external
from robusttrain.config.build import COMPANIONS, Stage, build_component, network
from robusttrain.data import Info
from robusttrain.errors import InputError

# What a saved model brings along when it is evaluated again, unless it is given once more.
INHERITED = ("dataset", "attack", "defense", "model", "noise", "norm", "eps", "seed", "data_dir")

# The part of it that a model alone needs, with all that its values may refer to.
INHERITED_BY_MODEL = ("model", "noise", "norm", "eps", "seed", "data_dir")

# Packages whose classes may be built from a configuration that somebody else has saved.
TRUSTED = ("robusttrain",)

# What a value in it may refer to: another key, or a variable of the environment. Other resolvers of
# OmegaConf make nodes out of text, and with them classes that nobody has looked at.
REFERENCE = re.compile(r"\$\{([\w.]+|oc\.env:[\w.,/ -]+)\}")


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
        _refuse_strangers(saved.config[key], [*TRUSTED, *config.trust])
        OmegaConf.update(config, key, saved.config[key], merge=False, force_add=True)
    # A key inside of a part does not choose the part: it is set on what was inherited.
    for key, value in inner.items():
        if key.partition(".")[0] in inherited:
            OmegaConf.update(config, key, value, merge=False, force_add=True)
    return inherited


def load_model(
    run: Path | str, *, trust: Sequence[str] = (), device: torch.device | str = "cpu"
) -> torch.nn.Module:
    """The trained model of a run, in eval mode, taking images (N, C, H, W) in [0, 1] to logits.

    Parameters
    ----------
    run
        A run directory, which stands for its `best.pt`, or a checkpoint file.
    trust
        Packages beside robusttrain whose classes may be built from the saved configuration.
    device
        Where to put it.

    Raises
    ------
    InputError
        If there is no such checkpoint, it is damaged, or it names a class of no trusted package.
    """
    try:
        saved = checkpoints.load(run)
    except InputError as error:
        # A command line names such a run by a key of this name, too: attack.source.run.
        raise InputError(str(error).replace("checkpoint=", "run=", 1)) from error
    plain = {key: saved.config[key] for key in INHERITED_BY_MODEL}
    _refuse_strangers(plain, [*TRUSTED, *trust])
    channels, height, width = saved.image_shape
    info = Info((channels, height, width), saved.num_classes, ())
    # A model that is a network already is initialised as soon as it is built.
    with torch.random.fork_rng(devices=[]):
        parts = build_component(OmegaConf.create(plain))
        model = network(parts["model"], parts["noise"], info, plain["seed"])
    saved.load_into(model, run)
    return model.eval().to(device)


def _destination(override: str) -> str:
    """The key that an override sets: in `+attack@evaluation.attacks.strong=pgd`, behind the @."""
    return override.lstrip("+~").partition("=")[0].rpartition("@")[2]


def _refuse_strangers(node: Any, trusted: Sequence[str]) -> None:
    for key, value in _leaves(node):
        if key == "_target_" and not _is_class_of(str(value), trusted):
            raise InputError(
                f"the checkpoint's configuration would build {value}, which is no class of "
                f"robusttrain: if you trust it, name its package in trust=[...]"
            )
        if "${" in REFERENCE.sub("", str(value)):
            raise InputError(
                f"the checkpoint's configuration would compute {value}: "
                f"only references to other keys are allowed there"
            )


def _is_class_of(target: str, packages: Sequence[str]) -> bool:
    """Whether a dotted name is a class that one of `packages` defines.

    A prefix alone proves nothing: every module of a package also holds what it imports.
    """
    module, _, name = target.rpartition(".")
    if module.partition(".")[0] not in packages:
        return False
    try:
        value = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return False
    return inspect.isclass(value) and value.__module__.partition(".")[0] in packages


def _leaves(node: Any, key: object = "") -> Iterator[tuple[object, Any]]:
    """(key, value) of all that is no container; what a sequence holds goes by the key of that."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _leaves(value, name)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _leaves(value, key)
    else:
        yield key, node
