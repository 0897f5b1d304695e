"""Evaluate a model that a Python program has."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from robusttrain import ranges
from robusttrain.api import task
from robusttrain.api.composition import composed, plain_errors
from robusttrain.api.given import (
    GivenData,
    GivenModel,
    Images,
    Model,
    classes_of,
    device_of,
    name_of,
    samples_of,
)
from robusttrain.api.isolation import isolated, program_terminal
from robusttrain.api.threats import own_threat
from robusttrain.attacks import Attack
from robusttrain.config import unread
from robusttrain.config.run_config import Config, Stage
from robusttrain.data import Split, image_index
from robusttrain.evaluation.settings import Evaluation
from robusttrain.models.passes import Passes
from robusttrain.report.result import Result
from robusttrain.runs import experiment
from robusttrain.runs.context import Origin, RunContext
from robusttrain.runs.cost import Costs, Work
from robusttrain.runs.inputs import Data, Inputs
from robusttrain.runs.manifest import manifest
from robusttrain.runs.preflight import check_inputs
from robusttrain.runs.rehearsal import rehearse
from robusttrain.runs.training_attack import TRAIN_ATTACK, UNKNOWN
from robusttrain.runtime.determinism import flags
from robusttrain.threat import Norm, Threat

# What a program checks by itself, and a command line by its exit code.
OF_EXIT_CODE = ("strict", "require", "baseline")

# The part of a configuration that an evaluation depends on.
KEPT = ("evaluation", "norm", "eps", "threats", "seed")


def evaluate(
    model: Model,
    x: Images,
    y: Tensor | None = None,
    *,
    eps: float | None = None,
    norm: Norm | str = Norm.linf,
    threats: Mapping[str, float] | None = None,
    evaluation: str = "standard",
    attacks: Mapping[str, Attack] | None = None,
    overrides: Sequence[str] = (),
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Result:
    """Attack a model, and audit the figures, as `robusttrain 'stages=[evaluate]'` does.

    The figures are those of the command line, bit by bit, for the same model, images and seed.
    The model keeps its mode, its flags, its gradients and its device. Global random streams and
    settings of torch stay as they are.

    Parameters
    ----------
    model
        A module, or any function, that takes images (N, C, H, W) in [0, 1] to logits (N, K), and
        has gradients with respect to the images. It is evaluated in eval mode.
    x
        Images (N, C, H, W), as floats in [0, 1] or as uint8; or a data set of pairs (image, label)
        or a loader of such batches, which is read once, in its order.
    y
        Labels (N,), integers from 0 to K - 1; left out with a data set or a loader.
    eps
        The radius of the threat model, in pixel units of [0, 1], 0 or more; in linf at most 1.
    norm
        Its norm: linf, l2 or l1.
    threats
        Several threat models in place of one: the radius of each norm, such as
        `{"linf": 0.3, "l2": 2}`. `eps` is then left out.
    evaluation
        The suite of attacks, an option of `conf/evaluation/`: autoattack (AutoAttack on all
        images), standard (the same on 100 images), full (more), fast and quick (less), eot for
        models that draw noise, certify for certificates, radii for the radius of each image.
    attacks
        More attacks by the names of their rows, after those of the suite.
    overrides
        Settings of the evaluation in the words of the command line, such as
        `evaluation.samples=500`.
    seed
        The seed of all draws.
    device
        Where it is computed: the device of the model if not given, which is never moved.
    progress
        Whether bars and notes are printed, on the standard error; warnings always are.

    Returns
    -------
    The tables of the figures. `print` shows them, and so does a notebook.

    Raises
    ------
    InputError
        If an argument is not allowed, or the model fails. The message names the key, the value and
        what is allowed; nothing was computed then.

    Examples
    --------
    >>> import torch
    >>> import robusttrain as rt
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    >>> x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    >>> words = ["evaluation.audit=false"]
    >>> result = rt.evaluate(
    ...     model, x, y, eps=8 / 255, evaluation="quick", overrides=words, progress=False
    ... )
    >>> result.table["attack"].tolist()
    ['clean', 'uniform', 'fgsm', 'pgd', 'apgd_ce', 'worst_case']
    """
    with isolated(), plain_errors():
        subject, samples = GivenModel(model), samples_of(x, y)
        words = [f"evaluation={evaluation}", *overrides]
        threat = own_threat(eps, norm, threats, "a radius, or threats with several")
        config, origin = _settings(words, threat, threats or {}, seed, attacks or {})
        place = device_of(subject, device, samples.images)
        samples = samples.to(place)
        data = GivenData(samples, samples, classes_of(subject, samples))
        names = {**origin.names, "model": subject.name, "dataset": name_of(x)}
        origin = origin._replace(names=names)
        config = replace(config, dataset=data, device=str(place))
        terminal = program_terminal(progress)
        context = RunContext(config, origin, data.info(), place, Path(), terminal)
        return _evaluated(context, Inputs(None, config.defense, subject), samples)


def _settings(
    words: Sequence[str],
    threat: Threat,
    threats: Mapping[str, float],
    seed: int,
    attacks: Mapping[str, Attack],
) -> tuple[Config, Origin]:
    """The configuration of an evaluation; its model and data are to be replaced."""
    for word in words:
        of_evaluation = re.match(r"[+~]*(evaluation|attack@evaluation)\b", word)
        allowed = "a setting of evaluation: the others have no effect here"
        ranges.require(of_evaluation is not None, "overrides", word, allowed)
    # A run that trains nothing names the model that it evaluates.
    config, names = composed(
        words, norm=threat.norm.value, eps=threat.eps, threats=dict(threats), seed=seed,
        stages=["evaluate"], checkpoint="given",
    )  # fmt: skip
    names |= {TRAIN_ATTACK: UNKNOWN, "defense": UNKNOWN, "noise": UNKNOWN}
    built, origin, ineffective = task.assembled(config, names, words)
    unread.refuse(ineffective)
    _refuse_exit_codes(built.evaluation)
    settings = replace(built.evaluation, attacks={**built.evaluation.attacks, **attacks})
    plain = {key: origin.config[key] for key in KEPT}
    return replace(built, evaluation=settings), Origin(plain, names, overrides=words)


def _refuse_exit_codes(settings: Evaluation) -> None:
    for key in OF_EXIT_CODE:
        value, allowed = (
            getattr(settings, key),
            "left out: a program checks the table of the result",
        )
        ranges.require(not value, f"evaluation.{key}", value, allowed)


def _evaluated(context: RunContext, inputs: Inputs, samples: Split) -> Result:
    check_inputs(context, inputs)
    rehearse(context, inputs)
    passes, costs = Passes(), Costs(context.device)
    with costs.measuring(Stage.evaluate) as done, passes.counting(inputs.model):
        found = experiment.examined(context, inputs.model, samples, None, is_foreign=True).found
        done(Work(len(context.config.evaluation.choose(samples.size)), passes))
    assert found is not None, "there is one process"
    images = image_index(context.config.dataset, samples.size)
    content = Data(samples, samples, {"test": samples.digest()}, {}, images)
    provenance = manifest(context.origin, context.device, content, costs, None, flags())
    return replace(experiment.reported(context, found, images), provenance=provenance)
