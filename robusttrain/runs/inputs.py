"""Model, defense and data of a run."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from robusttrain.checkpoints import external
from robusttrain.checkpoints.checkpoint import Checkpoint
from robusttrain.checkpoints.external import ExportedProgram, ExternalModel, Weights
from robusttrain.checkpoints.initial_weights import DEFAULT
from robusttrain.config.build import named_in
from robusttrain.config.schema import NOTHING
from robusttrain.data import (
    Dataset,
    FromFiles,
    ImageIndex,
    Info,
    Mapped,
    Samples,
    Streamed,
    extra_samples,
    image_index,
)
from robusttrain.defenses import Defense, Unsupervised, WithModels
from robusttrain.errors import InputError, returned
from robusttrain.evaluation import model_checks
from robusttrain.models import build_model
from robusttrain.models.initialisation import initialise as initialise_randomly
from robusttrain.models.network import network
from robusttrain.report.terminal import Terminal
from robusttrain.run_directory import LATEST, PREVIOUS
from robusttrain.runs.context import RunContext
from robusttrain.runs.saved_model import load_model
from robusttrain.runtime import distributed
from robusttrain.runtime.out_of_memory import is_out_of_memory

T = TypeVar("T")

Given = Checkpoint | ExternalModel | None
"""The content of `checkpoint` or of `model.weights`, or None if neither is set."""


class Inputs(NamedTuple):
    """The model and the defense that a run starts with, before any data is read.

    Parameters
    ----------
    given
        The content of `checkpoint` or of `model.weights`.
    defense
        The defense, with the models of other runs that it needs for training.
    model
        The model on the CPU, with its noise and with the weights of `given`.
    weights
        Where `model.weights` are from, for the manifest; None without, or if they were not read.
    """

    given: Given
    defense: Defense
    model: nn.Module
    weights: Mapping[str, str | None] | None = None


class Data(NamedTuple):
    """The data of a run.

    Parameters
    ----------
    train, test
        The training and the test set.
    extra
        Extra images for training; None without.
    digests
        The digest of each, by its name.
    contents
        The number of images of each class and split, for the manifest.
    images
        How the test images are found in the data set as published.
    """

    train: Samples
    test: Samples
    digests: dict[str, str]
    contents: dict[str, Any]
    images: ImageIndex
    extra: Samples | None = None


def inputs_of(context: RunContext) -> Inputs:
    """Load the checkpoint, and build the model and the defense.

    Raises
    ------
    InputError
        If the checkpoint, or a run that the defense names, cannot be used here.
    """
    config = context.config
    given = given_to(context)
    distributed.set_device(context.device)
    defense = config.defense
    if context.trains and isinstance(defense, WithModels):
        defense = defense.with_models(partial(other_model, config.trust, context.info))
    weights = None if has_own_weights(context) else config.initial_weights.provenance()
    model = model_of(context, given)
    if context.trains and isinstance(defense, Unsupervised):
        _refuse_random_weights(context, given)
        defense = with_original(context, defense, model)
    return Inputs(given, defense, model, weights)


def with_original(context: RunContext, defense: Defense, model: nn.Module) -> Defense:
    """The defense, which keeps `model` as it is now if it needs that.

    Raises
    ------
    InputError
        If it needs that, and the model has no head that can be told or is to be compiled.
    """
    if not isinstance(defense, Unsupervised):
        return defense
    if context.config.training.compile:
        allowed = (
            f"false with defense={context.origin.names['defense']}, which looks into the model"
        )
        raise InputError("training.compile", "true", allowed)
    return defense.with_original(model, context.info.num_classes)


def _refuse_random_weights(context: RunContext, given: Given) -> None:
    """Refuse a new network, whose features are worth nothing.

    A module that the configuration names may have its weights already.
    """
    is_new = given is None and not isinstance(context.config.model, nn.Module)
    if is_new and not has_own_weights(context):
        problem = "keeps the features of the model, which is new"
        allowed = "give model.weights=FILE, or checkpoint=RUN"
        raise InputError("defense", context.origin.names["defense"], allowed, problem)


def given_to(context: RunContext) -> Given:
    """The content of `checkpoint` or of `model.weights`; None if the model starts without them."""
    config, initial = context.config, context.config.initial_weights
    if config.checkpoint is not None:
        return external.load(config.checkpoint, config.trust)
    if initial.weights is None or has_own_weights(context):
        return None
    if initial.weights == DEFAULT:
        with named_in(context.origin.config, "model"):
            # Processes of one machine share the file that is downloaded.
            return distributed.in_turns(
                lambda: initial.default(config.model, context.info.image_shape)
            )
    return initial.read(config.trust)


def has_own_weights(context: RunContext) -> bool:
    """Whether a run is resumed from a checkpoint of its own, so that it needs no other weights."""
    own = (context.run_dir / name for name in (LATEST, PREVIOUS))
    return context.config.resume is not None and any(path.is_file() for path in own)


def model_of(context: RunContext, given: Given) -> nn.Module:
    """The model on the CPU, with its noise and with the weights that it is given."""
    config, terminal = context.config, context.terminal
    if isinstance(given, ExportedProgram):
        return _program(context, given)
    starts = given is not None and config.checkpoint is None
    initialise = partial(initialised, context, given) if starts and not _is_noisy(given) else None
    if given is None:
        initialise = partial(initialise_randomly, kind=config.initial_weights.initialisation)
    with named_in(context.origin.config, "model", "noise"):
        model = network(config.model, config.noise, context.info, config.seed, initialise)
    if starts:
        if initialise is None:
            initialised(context, given, model)
    elif isinstance(given, Weights):
        terminal.say(given.load_into(model, str(config.checkpoint)))
    elif given is not None:
        given.load_into(model, str(config.checkpoint))
    return model


def _program(context: RunContext, given: ExportedProgram) -> nn.Module:
    """A program with its noise, which replaces the model."""
    if context.trains:
        problem = "is a program, which cannot be trained"
        raise InputError(str(given), allowed="give stages=[evaluate]", problem=problem)
    config = context.config
    with named_in(context.origin.config, "noise"):
        model = network(given, config.noise, context.info, config.seed)
    context.terminal.say(f"{given} is a program of {given.kind}, which replaces model=")
    return model


def initialised(context: RunContext, given: Given, model: nn.Module) -> None:
    """Load the content of `model.weights` into `model`, and print how it fits."""
    assert isinstance(given, Checkpoint | Weights), "programs were refused"
    initial, classes = context.config.initial_weights, context.info.num_classes
    for line in initial.load_into(model, given, classes, trains=context.trains):
        context.terminal.say(line)


def _is_noisy(given: Given) -> bool:
    """Whether weights are those of a model with noise, whose names they have."""
    return isinstance(given, Checkpoint) and given.names.get("noise", NOTHING) != NOTHING


def other_model(trust: Sequence[str], info: Info, key: str, run: str) -> nn.Module:
    """The model of the run that the defense's `key` names, for the images and classes of `info`."""
    try:
        model = load_model(run, trust=trust)
        return build_model(model, info.num_classes, info.image_shape)
    except InputError as error:
        if error.key == "run":
            raise error.of(f"defense.{key}") from error
        raise InputError(f"defense.{key}", run, str(error), "cannot be used") from error


def data_of(context: RunContext) -> Data:
    """Load the data; decode the test set if it will be evaluated and fits in memory.

    An image that cannot be decoded is thus found before training, not days after its start.

    Raises
    ------
    InputError
        If images cannot be read, are not bytes, or do not fit in memory; or if images are to be
        evaluated that are not in the test set.
    """
    config, terminal = context.config, context.terminal
    extra = extra_samples(config.dataset, context.info) if context.trains else None
    with named_in(context.origin.config, "dataset"):
        train, test = loaded(config.dataset, context.origin.names["dataset"])
    images = image_index(config.dataset, test.size)
    if context.evaluates:
        chosen = config.evaluation.located(images.positions).choose(test.size)
        model_checks.refuse_too_many(test, chosen, context.device)
    parts = {"train": train, "test": test} | ({} if extra is None else {"extra": extra})
    digest = digests(parts, terminal)
    counts = contents(config.dataset, context.info, train, test)
    if isinstance(config.dataset, FromFiles):
        terminal.say(config.dataset.summary())
    if context.evaluates:
        test = placed(test, "cpu", "test", terminal)
    return Data(train, test, digest, counts, images, extra)


def loaded(dataset: Dataset, name: str) -> tuple[Samples, Samples]:
    """The training and the test set of `dataset`, whose option is `name`; both hold bytes."""
    try:
        train, test = returned("dataset.load", distributed.in_turns(dataset.load), tuple)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise InputError("dataset", name, problem="does not fit into memory") from error
    for samples in (train, test):
        model_checks.refuse_outside_box(samples, name)
    return train, test


def digests(parts: Mapping[str, Samples], terminal: Terminal) -> dict[str, str]:
    """A digest of each part of the data, for `manifest.json`."""
    size = sum(part.size for part in parts.values())
    with terminal.progress("reading the data", size) as bar:
        return of_each(parts, lambda name, part: part.digest(bar.advance))


def of_each(parts: Mapping[str, Samples], work: Callable[[str, Samples], T]) -> dict[str, T]:
    """The result of `work` for each of the parts, by its name.

    Raises
    ------
    InputError
        With all messages, if some parts cannot be read.
    """
    found, errors = {}, []
    for name, part in parts.items():
        try:
            found[name] = work(name, part)
        except InputError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else InputError("; ".join(map(str, errors)))
    return found


def contents(dataset: Dataset, info: Info, train: Samples, test: Samples) -> dict[str, Any]:
    """The number of images of each class and split, and what `dataset` has not read."""
    names = info.class_names or tuple(map(str, range(info.num_classes)))
    counts = zip(
        *(part.labels.bincount(minlength=len(names)).tolist() for part in (train, test)),
        strict=True,
    )
    classes = {
        name: {"train": first, "test": second}
        for name, (first, second) in zip(names, counts, strict=True)
    }
    others = dataset.contents() if isinstance(dataset, FromFiles) else {}
    return {"classes": classes, **others}


def placed(samples: Samples, device: torch.device | str, name: str, terminal: Terminal) -> Samples:
    """Prepare the samples for `device`; report if they are streamed instead of held in memory."""
    with terminal.progress(f"{name} images", samples.size) as bar:
        placed = samples.to(device, bar.advance)
    if isinstance(placed, Streamed | Mapped) and placed.size:
        size = f"{placed.decoded_bytes / 1e9:.3g} GB decoded"
        terminal.say(f"{placed.size} {name} images are streamed from their files ({size})")
    return placed
