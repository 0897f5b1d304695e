"""Checks before any work: what is refused, and what is warned of."""

from typing import Any, cast

from omegaconf import OmegaConf
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.attacks import Attack, Attacking, Demanding, fitted, parts
from robusttrain.bounds.intervals import refuse_unbounded
from robusttrain.checkpoints.checkpoint import Checkpoint
from robusttrain.config.build import named_in
from robusttrain.config.run_config import Config, Stage
from robusttrain.data import Dataset, Extended, own_images
from robusttrain.defenses import Selective, Unsupervised
from robusttrain.errors import InputError
from robusttrain.evaluation import Evaluation, model_checks
from robusttrain.evaluation.certification import certifiable
from robusttrain.evaluation.settings import differences
from robusttrain.evaluation.voting import least_votes
from robusttrain.models.network import listed, places_without_noise
from robusttrain.noise.layer import noise_layers
from robusttrain.noise.placement import INPUT
from robusttrain.optim.averaging import SWA
from robusttrain.optim.schedules import Cosine, OneCycle
from robusttrain.report.terminal import Terminal
from robusttrain.runs.context import RunContext
from robusttrain.runs.device import device_of
from robusttrain.runs.inputs import Given, Inputs
from robusttrain.threat import Norm


def check_settings(config: Config) -> None:
    """Refuse a missing device or file, and what does not fit a training: a curriculum, an average.

    It runs before anything is loaded or written.

    Raises
    ------
    InputError
        If `device`, `model.weights`, `training.curriculum` or `averaging` is not allowed.
    """
    training = config.training
    training.curriculum.at(config.defense, 1, max(1, training.epochs))
    device_of(config.device)
    config.evaluation.refuse_unknown_figures()
    if config.resume is None:
        config.initial_weights.file()
    if Stage.train in config.stages and config.resume is None:
        _refuse_average_at_the_end(config)


def _refuse_average_at_the_end(config: Config) -> None:
    """Refuse SWA with a learning rate that falls to 0, where all weights are almost the same."""
    if isinstance(config.averaging, SWA) and isinstance(config.schedule, OneCycle | Cosine):
        problem = "needs a learning rate that stays high"
        raise InputError("averaging", "swa", "schedule=constant or schedule=step", problem)


def check_inputs(context: RunContext, inputs: Inputs) -> None:
    """Refuse a model that cannot be trained or evaluated with this configuration.

    Warn of other classes, of places without noise, and if it is to be certified with noise that it
    was not trained with. All this happens before data is loaded.

    Raises
    ------
    InputError
        If the model does not fit the defense or the evaluation, or an attack the data set.
    """
    config, shape = context.config, context.info.image_shape
    refuse_attacks(context)
    warn_of_other_classes(context, inputs.given)
    warn_of_places_without_noise(inputs.model, shape, context.terminal)
    if context.trains:
        _refuse_empty_crops(config.dataset, shape)
        if isinstance(config.dataset, Extended) and config.dataset.extra is not None:
            own_images(config.dataset.extra_share, config.training.batch_size)
    if context.trains and isinstance(inputs.defense, Selective):
        inputs.defense.refuse_unfit(inputs.model, shape)
    if context.trains and isinstance(inputs.defense, Unsupervised):
        _warn_of_choice_by_labels(context)
    if not context.evaluates:
        return
    norms = [threat.norm for threat in config.evaluated]
    box = Norm.linf if Norm.linf in norms else config.norm
    refuse_evaluation(config.evaluation, inputs.model, box, shape)
    if config.evaluation.certification is not None:
        trained = _noise_of_training(context.trains, inputs.model, inputs.given)
        warn_of_other_noise(inputs.model, trained, context.terminal)


def refuse_attacks(context: RunContext) -> None:
    """Refuse attacks that do not fit the images or the number of classes.

    An evaluation fits its attacks to few classes, and reports it. A training does not.
    """
    info, config = context.info, context.config
    attacks = {f"evaluation.attacks.{name}": a for name, a in config.evaluation.attacks.items()}
    radii = config.evaluation.radii
    if radii is not None:
        attacks |= {f"evaluation.radii.attacks.{name}": a for name, a in radii.attacks.items()}
    used = dict(attacks) if context.evaluates else {}
    if context.trains and config.training.validation_attack is not None:
        used["training.validation_attack"] = config.training.validation_attack
    if context.trains and isinstance(config.defense, Attacking):
        used["defense.attack"] = config.defense.attack
        for depth, attack in enumerate(parts(config.defense)[1:], start=1):
            with named_in(context.origin.config, "defense" + depth * ".attack"):
                refuse_few_classes(cast(Attack, attack), info.num_classes)
    for section, attack in used.items():
        if isinstance(attack, Demanding):
            with named_in(context.origin.config, section):
                attack.refuse_unfit(info.num_classes, info.image_shape)


def refuse_few_classes(attack: Attack, num_classes: int) -> None:
    """Refuse an attack that needs more classes than there are."""
    for key, (before, after) in differences(attack, fitted(attack, num_classes)).items():
        raise InputError(key, before, f"{after} for {num_classes} classes")


def warn_of_other_classes(context: RunContext, given: Given) -> None:
    """Warn if a model is evaluated on other classes than it was trained on."""
    if context.trains or not isinstance(given, Checkpoint):
        return
    before, today = given.class_names, list(context.info.class_names)
    if before and today and before != today:
        first = next((a, b) for a, b in zip(before, today, strict=True) if a != b)
        context.terminal.warn(
            f"the model was trained on other classes than those of the data set, or in "
            f"another order: {first[0]} is now {first[1]}"
        )


def _warn_of_choice_by_labels(context: RunContext) -> None:
    """Warn if labels, and a head that may be new, choose the weights of a training without them."""
    if context.config.dataset.validation > 0:
        context.terminal.warn(
            f"defense={context.origin.names['defense']} reads no labels, but those of the "
            f"validation images choose the best epoch, by the head as it starts: "
            f"dataset.validation=0 keeps the last epoch"
        )


def _refuse_empty_crops(dataset: Dataset, image_shape: tuple[int, int, int]) -> None:
    """Refuse shifts that leave nothing of an image."""
    side = min(image_shape[1:])
    allowed = f"less than the {side} pixels of a side of the images"
    ranges.require(dataset.crop < side, "dataset.crop", dataset.crop, allowed)


def refuse_evaluation(
    settings: Evaluation, model: nn.Module, norm: Norm, image_shape: tuple[int, int, int]
) -> None:
    """Refuse an empty suite, too few votes, and proofs or certificates that do not exist."""
    ranges.require(
        bool(settings.attacks) or settings.certification is not None,
        "evaluation.attacks",
        {},
        "one attack or more, as evaluation=fast has",
    )
    least = least_votes(model)
    ranges.require(
        settings.votes >= least,
        "evaluation.votes",
        settings.votes,
        f"a finite number, {least} or more",
    )
    if settings.verify:
        refuse_unbounded(model, image_shape, norm, "evaluation.verify=true")
    if settings.verification is not None:
        # Other balls have bounds, too, which begin with those of the box around them.
        refuse_unbounded(model, image_shape, Norm.linf, "evaluation.verification")
    if settings.certification is not None:
        certifiable(model)


def warn_of_places_without_noise(
    model: nn.Module, image_shape: tuple[int, int, int], terminal: Terminal
) -> None:
    """Warn if the predictions of `model` do not use some layers that have noise."""
    places = places_without_noise(model, image_shape)
    if places:
        where = f"{listed(places)}, which the predictions do not use"
        terminal.warn(f"noise= has no effect in {where}")


def warn_of_other_noise(model: nn.Module, trained: str, terminal: Terminal) -> None:
    """Warn if certification uses other noise than training, which `trained` describes."""
    sigma = certifiable(model).sigma
    if trained != f"sigma {sigma:g}":
        terminal.warn(
            f"the model was trained with {trained} and is certified with sigma {sigma:g}: "
            f"few images can be certified without such noise in training"
        )


def _noise_of_training(trains: bool, model: nn.Module, given: Given) -> str:
    """A description of the noise at the input that the model was, or will be, trained with."""
    if trains:
        seen = noise_layers(model)[0].on_train
        return f"sigma {certifiable(model).sigma:g}" if seen else "no noise"
    if not isinstance(given, Checkpoint):
        return "unknown noise"
    noise: Any = OmegaConf.to_container(OmegaConf.create(given.config).noise, resolve=True)
    mechanisms = noise.get("mechanisms", {"": noise}).values()
    sigmas = [m["sigma"] for m in mechanisms if m.get("train") and m.get("at") == INPUT]
    return f"sigma {sigmas[0]:g}" if sigmas else "no noise"


def inspect_model(
    model: nn.Module, batch: tuple[Tensor, Tensor], is_foreign: bool, terminal: Terminal
) -> None:
    """Warn of properties of a model that make the figures of its evaluation misleading.

    A line states what was assumed of a foreign model.

    Parameters
    ----------
    model
        The model, on its device.
    batch
        Images (N, C, H, W) in [0, 1] and labels (N,).
    is_foreign
        Whether it comes from another tool.
    terminal
        The terminal for warnings.
    """
    x, y = batch
    for finding in model_checks.inspect(model, x, y, foreign=is_foreign):
        if finding.message:
            terminal.warn(finding.message)
        elif finding.note:
            terminal.say(finding.note)
