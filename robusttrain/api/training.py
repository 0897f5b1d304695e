"""Train a model that a Python program has."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from robusttrain import ranges, seeding
from robusttrain.api import task
from robusttrain.api.composition import composed, plain_errors
from robusttrain.api.given import GivenData, GivenModel, Images, classes_of, device_of, samples_of
from robusttrain.api.isolation import isolated, program_terminal
from robusttrain.api.threats import own_threat
from robusttrain.attacks import Bounded, parts, states_threat, threats, with_threat
from robusttrain.config import unread
from robusttrain.config.run_config import Config
from robusttrain.defenses import Defense
from robusttrain.errors import InputError
from robusttrain.models.modes import modes_restored
from robusttrain.report.terminal import Terminal
from robusttrain.runs import experiment
from robusttrain.runs.context import Origin, RunContext
from robusttrain.runs.inputs import Inputs, with_original
from robusttrain.runs.preflight import check_inputs
from robusttrain.runs.rehearsal import rehearse
from robusttrain.threat import Norm, Threat
from robusttrain.training.diagnostics import findings_in_last
from robusttrain.training.metrics import Epoch
from robusttrain.training.trainable import partly_frozen
from robusttrain.training.trainer import Trainer

# The settings that a training of given images and a given model reads.
SETTINGS = re.compile(
    r"[+~]*(attack|averaging|dataset\.(crop|flip)|defense|optimizer|schedule|training"
    r"|weight_perturbation)\b"
)

# Those of the defense.
OF_DEFENSE = re.compile(r"[+~]*(attack|defense)\b")


def train(
    model: nn.Module,
    x: Images,
    y: Tensor | None = None,
    *,
    defense: Defense | str = "madry",
    eps: float | None = None,
    norm: Norm | str = Norm.linf,
    threats: Mapping[str, float] | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    validation: float = 0.1,
    overrides: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> Iterator[Epoch]:
    """Train a model against adversarial examples, epoch by epoch, as `robusttrain` does.

    The model is trained in place, on its device. After each epoch it has the weights of that epoch.
    When the loop ends, it has those of the best one: with the highest robust accuracy on the images
    held out for validation, or the last one if none are; averaged, if weights are averaged. A loop
    that is left early leaves the weights as they are. Modes, global random streams and settings of
    torch stay as they were.

    Parameters
    ----------
    model
        A module from images (N, C, H, W) in [0, 1] to logits (N, K).
    x, y
        Images and labels, a data set or a loader, as for `evaluate`. They are read once, before
        training: random shifts and reflections are the settings `dataset.crop` and `dataset.flip`.
    defense
        An option of `conf/defense/`, such as trades, or an object, such as
        `rt.defenses.TRADES(rt.attacks.PGD(steps=7))`.
    eps, norm
        The threat model, which the defense and its attack get; `eps` is in pixel units of [0, 1].
        An object that states its own needs no `eps`, and refuses another one.
    threats
        Several threat models in place of one, for the name of a defense: the radius of each norm,
        as in `defense="avg", threats={"linf": 0.3, "l2": 2}`. `norm` chooses the one that attacks
        for a single threat model search.
    epochs, batch_size
        Passes over the images, and images in a step; 1 or more.
    validation
        Images that are held out: a share from 0 to below 1, or a number of images from 1 on.
    overrides
        Settings of the training in the words of the command line, such as `optimizer.lr=0.01`,
        `averaging=ema` or `training.curriculum.eps_warmup=0.5`.
    seed
        The seed of all draws.
    progress
        Whether a bar and notes are printed, on the standard error; warnings always are.

    Returns
    -------
    An iterator over the epochs; each has the columns of `train.csv` as attributes.

    Raises
    ------
    InputError
        If an argument is not allowed, or the model cannot be trained; when the function is called.
    NonFiniteLossError
        If training diverges; from the iterator.

    Examples
    --------
    >>> import torch
    >>> import robusttrain as rt
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    >>> x, y = torch.rand(40, 1, 8, 8), torch.arange(40) % 4
    >>> defense = rt.defenses.TRADES(rt.attacks.PGD(steps=2, start="gaussian"))
    >>> for epoch in rt.train(model, x, y, defense=defense, eps=0.1, epochs=2, progress=False):
    ...     print(epoch.epoch)
    1
    2
    """
    with isolated(), plain_errors():
        threat = _threat(defense, eps, norm, threats)
        values: dict[str, Any] = {"seed": seed, "epochs": epochs, "batch_size": batch_size}
        values |= {"threats": dict(threats)} if threats else {}
        config, origin = _settings(defense, overrides, threat, values)
        ranges.require(isinstance(model, nn.Module), "model", type(model).__name__, "a module")
        subject, samples = GivenModel(model), samples_of(x, y)
        samples = samples.to(device_of(subject, None, samples.images))
        own, classes = config.dataset, classes_of(subject, samples)
        data = GivenData(samples, samples, classes, validation, own.crop, own.flip)
        config = replace(config, dataset=data, device=str(samples.device))
        terminal = program_terminal(progress)
        context = RunContext(config, origin, data.info(), samples.device, Path(), terminal)
        inputs = Inputs(None, with_original(context, config.defense, subject), subject)
        check_inputs(context, inputs)
        rehearse(context, inputs)
        frozen = partly_frozen(subject, config.training, classes, inputs.defense)
        with modes_restored(subject), frozen:
            trainer = experiment.trainer_of(context, inputs, samples)
        return _epochs(trainer, classes, seed, terminal)


def _threat(
    defense: Defense | str,
    eps: float | None,
    norm: Norm | str,
    several: Mapping[str, float] | None,
) -> Threat:
    """The threat model of a training; an object refuses another one than it states."""
    if isinstance(defense, str):
        return own_threat(eps, norm, several, "a radius, with the name of a defense")
    allowed = "left out with an object, which states its own"
    ranges.require(not several, "threats", several, allowed)
    stated = threats(defense)
    if eps is None:
        known = states_threat(defense) and bool(stated)
        ranges.require(known, "eps", None, "a radius: the defense states none")
        return stated[0]
    threat = Threat(cast(Norm, norm), eps)
    for part in parts(defense):
        own = part.threat if isinstance(part, Bounded) else None
        if own is not None and own not in (threat, _by_default(part)):
            problem = f"is not the threat model of {type(part).__name__}, which has {own}"
            raise InputError("eps", eps, "leave one of both out", problem)
    return threat


def _by_default(part: object) -> Threat | None:
    """The threat model that a component has if it is given none; None if it has to be given one."""
    if not is_dataclass(part):
        return None
    default = {field.name: field.default for field in fields(part)}
    norm, eps = default.get("norm"), default.get("eps")
    return Threat(norm, eps) if isinstance(norm, Norm) and isinstance(eps, float) else None


def _settings(
    defense: Defense | str, overrides: Sequence[str], threat: Threat, values: Mapping[str, Any]
) -> tuple[Config, Origin]:
    """The configuration of a training; its model and data are to be replaced."""
    by_name = isinstance(defense, str)
    for word in overrides:
        allowed = "a setting of training: the others have no effect here"
        ranges.require(SETTINGS.match(word) is not None, "overrides", word, allowed)
        allowed = "left out: the defense is an object, which has its settings"
        ranges.require(by_name or not OF_DEFENSE.match(word), "overrides", word, allowed)
    words = [f"defense={defense}", *overrides] if by_name else overrides
    config, names = composed(
        words, norm=threat.norm.value, eps=threat.eps, stages=["train"], **values
    )
    built, origin, ineffective = task.assembled(config, names, words)
    unread.refuse(ineffective)
    if isinstance(defense, str):
        return built, origin
    names = {**origin.names, "defense": type(defense).__name__}
    return replace(built, defense=with_threat(defense, threat)), origin._replace(names=names)


def _epochs(trainer: Trainer, classes: int, seed: int, terminal: Terminal) -> Iterator[Epoch]:
    """Train, and leave the best weights in the model."""
    model, planned, done = trainer.model, trainer.settings.epochs, list[Epoch]()
    best = copy.deepcopy(model.state_dict())
    running, stream = trainer.epochs(), seeding.derived_seed(seed, "initialisation")
    global_stream = torch.Generator().manual_seed(stream).get_state()
    while True:
        frozen = partly_frozen(model, trainer.settings, classes, trainer.defense)
        with isolated(), modes_restored(model), frozen:
            torch.set_rng_state(global_stream)
            epoch = next(running, None)
            global_stream = torch.get_rng_state()
            if epoch is None:
                break
            done.append(epoch)
            for finding in findings_in_last(done, classes, planned):
                terminal.warn(finding.message)
            if epoch.rank >= max(one.rank for one in done):
                with trainer.averaged():
                    best = copy.deepcopy(model.state_dict())
        yield epoch
    model.load_state_dict(best)
