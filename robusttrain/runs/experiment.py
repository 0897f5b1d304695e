"""A run from top to bottom: data, model, training, evaluation, report."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from omegaconf import OmegaConf
from torch import nn

from robusttrain import ranges
from robusttrain.checkpoints import external
from robusttrain.checkpoints.checkpoint import Checkpoint
from robusttrain.checkpoints.external import Foreign, Program, Weights
from robusttrain.config.build import COMPANIONS, GROUPS, NOTHING, Config, Stage, network
from robusttrain.data import Info, Samples, Streamed, hold_out
from robusttrain.defenses import Selective, WithModels
from robusttrain.errors import InputError
from robusttrain.evaluation import model_checks
from robusttrain.evaluation.certification import certifiable
from robusttrain.evaluation.pipeline import Examined, Found, examined
from robusttrain.evaluation.voting import least_votes
from robusttrain.intervals import refuse_unbounded
from robusttrain.loggers import Record, flat, of_epoch, of_report
from robusttrain.loggers.none import NoLogger
from robusttrain.models import build_model
from robusttrain.noise import noise_layers
from robusttrain.noise.placement import INPUT
from robusttrain.report.files import write_arrays, write_csv, write_json
from robusttrain.report.terminal import Terminal
from robusttrain.run_directory import (
    ADVERSARIAL,
    AUDIT,
    CERTIFIED,
    CURVE,
    MANIFEST,
    PIECES,
    REPORT,
    SAMPLES,
)
from robusttrain.runs.inherit import load_model
from robusttrain.runs.manifest import manifest
from robusttrain.runtime import distributed
from robusttrain.runtime.determinism import deterministic, flags
from robusttrain.training.checkpointing import TrainingRun, newest_checkpoint
from robusttrain.training.metrics import Epoch
from robusttrain.training.microbatches import refused_where_too_large
from robusttrain.training.overfitting import summary
from robusttrain.training.trainer import Trainer


class Origin(NamedTuple):
    """Where a run comes from: its configuration as containers, and the option of each group.

    `overrides` is what the user gave of it, as words of a command line.
    """

    config: dict[str, Any]
    names: Mapping[str, str]
    overrides: Sequence[str] = ()

    def resolved(self) -> dict[str, Any]:
        """The configuration with every reference replaced by its value."""
        resolved: Any = OmegaConf.to_container(OmegaConf.create(self.config), resolve=True)
        return cast("dict[str, Any]", resolved)

    def parameters(self) -> dict[str, Any]:
        """The options by their groups, and all values by their full keys, for a logger."""
        options = {group: self.names[group] for group in GROUPS if group in self.names}
        return options | flat(self.resolved())


def run(config: Config, origin: Origin, run_dir: Path, terminal: Terminal) -> float | None:
    """Train and evaluate as `config.stages` say, and leave the results in `run_dir`.

    Of several processes the first one writes.

    Returns the robust accuracy on the validation split of the weights in `best.pt`, the figure
    that a search over settings may maximise without touching the test set; None where none was
    measured.

    Raises
    ------
    InputError
        If the parts do not fit together, before data is loaded; or if data cannot be read.
    NonFiniteLossError
        If training diverges; what earlier epochs left stays on disk.
    """
    config.logger.check()
    device = config.torch_device()
    info = config.dataset.info()
    given = None if config.checkpoint is None else external.load(config.checkpoint)
    distributed.settle_on(device)
    if Stage.train in config.stages and isinstance(config.defense, WithModels):
        config.defense = config.defense.with_models(partial(_other_model, config, info))
    model = _model(config, info, given, terminal)
    if Stage.train in config.stages and isinstance(config.defense, Selective):
        config.defense.refuse_unfit(model, info.image_shape)
    _check_evaluation(config, model, info, given, terminal)
    seconds: dict[str, float] = {}
    train, test = _loaded(config, origin.names["dataset"], device)
    digests = _digests(train, test, terminal)
    if Stage.evaluate in config.stages:
        # An image that cannot be decoded is told of before the work, not after days of training.
        test = _placed(test, "cpu", "test", terminal)
    best: Epoch | None = None
    course: dict[str, Any] | None = None
    model.to(device)
    logger = config.logger if distributed.is_main() else NoLogger()
    with (
        deterministic(config.deterministic),
        logger.record(run_dir, origin.parameters()) as record,
    ):
        repeatable = flags()
        if Stage.train in config.stages:
            started = time.perf_counter()
            training = _train(config, origin, model, info, train, run_dir, terminal, record)
            best, course = training.best, summary(training.epochs)
            seconds["train"] = time.perf_counter() - started
        if Stage.evaluate in config.stages:
            started = time.perf_counter()
            test = test.to(device)
            _inspect(config, origin.names, model, isinstance(given, Foreign), test, terminal)
            results = _evaluate(config, model, test, run_dir, terminal)
            if results.found is not None:
                report = _report(config, origin.names, results.found, run_dir, terminal)
                record(of_report(report), best.epoch if best else 0)
            distributed.together()
            results.pieces.remove()
            seconds["evaluate"] = time.perf_counter() - started
    if distributed.is_main():
        content = manifest(
            origin.resolved(), origin.overrides, device, digests, seconds,
            training=course, determinism=repeatable,
        )  # fmt: skip
        write_json(run_dir / MANIFEST, content)
    return best.val_robust_accuracy if best else None


def _loaded(config: Config, name: str, device: torch.device) -> tuple[Samples, Samples]:
    """The training and the test set, of which nothing is left that could be refused."""
    train, test = distributed.in_turns(config.dataset.load)
    for samples in (train, test):
        model_checks.refuse_outside_box(samples, name)
    if Stage.evaluate in config.stages:
        model_checks.refuse_too_many(test, config.evaluation.choose(test.size), device)
    return train, test


def _model(
    config: Config, info: Info, given: Checkpoint | Foreign | None, terminal: Terminal
) -> nn.Module:
    """The model on the CPU, with its noise, and with what `checkpoint` has given for it."""
    if isinstance(given, Program):
        if Stage.train in config.stages:
            raise InputError(
                f"{given} is a program, which cannot be trained: give stages=[evaluate]"
            )
        model = network(given, config.noise, info, config.seed)
        terminal.say(f"{given} is a program of {given.kind}, which takes the place of model=")
        return model
    model = network(config.model, config.noise, info, config.seed)
    if isinstance(given, Weights):
        terminal.say(given.load_into(model, str(config.checkpoint)))
    elif given is not None:
        given.load_into(model, str(config.checkpoint))
    return model


def _other_model(config: Config, info: Info, key: str, run: str) -> nn.Module:
    """The model of the run that the defense's `key` names, for the images and classes of `info`."""
    try:
        model = load_model(run, trust=config.trust)
        return build_model(model, info.num_classes, info.image_shape)
    except InputError as error:
        raise InputError(f"defense.{key}={run}: {error}") from error


def _check_evaluation(
    config: Config,
    model: nn.Module,
    info: Info,
    given: Checkpoint | Foreign | None,
    terminal: Terminal,
) -> None:
    """Refuse votes that decide nothing, and certificates and proofs that do not exist.

    Where certificates are asked for, warn if the model was not trained for them.
    """
    if Stage.evaluate not in config.stages:
        return
    ranges.at_least(least_votes(model), **{"evaluation.votes": config.evaluation.votes})
    if config.evaluation.verify:
        refuse_unbounded(model, info.image_shape, config.norm, "evaluation.verify=true")
    if config.evaluation.certification is None:
        return
    sigma = certifiable(model).sigma
    trained = _noise_of_training(config, model, given)
    if trained != f"sigma {sigma:g}":
        terminal.say(
            f"warning: certifying with sigma {sigma:g} a model that was trained with {trained}: "
            f"few images can be certified where it has not seen such noise"
        )


def _noise_of_training(config: Config, model: nn.Module, given: Checkpoint | Foreign | None) -> str:
    """The size of the noise at the input that the model has learnt from, or will, in words."""
    if isinstance(given, Foreign):
        return "noise that nobody has told"
    if Stage.train in config.stages:
        seen = noise_layers(model)[0].on_train
        return f"sigma {certifiable(model).sigma:g}" if seen else "no noise"
    assert given is not None
    noise: Any = OmegaConf.to_container(OmegaConf.create(given.config).noise, resolve=True)
    mechanisms = noise.get("mechanisms", {"": noise}).values()
    sigmas = [m["sigma"] for m in mechanisms if m.get("train") and m.get("at") == INPUT]
    return f"sigma {sigmas[0]:g}" if sigmas else "no noise"


def _digests(train: Samples, test: Samples, terminal: Terminal) -> dict[str, str]:
    with terminal.progress("looking at the data", train.size + test.size) as bar:
        return {"train": train.digest(bar.advance), "test": test.digest(bar.advance)}


def _placed(samples: Samples, device: torch.device | str, name: str, terminal: Terminal) -> Samples:
    """The samples for use on `device`; says so where they are not in memory."""
    with terminal.progress(f"{name} images", samples.size) as bar:
        placed = samples.to(device, bar.advance)
    if isinstance(placed, Streamed) and placed.size:
        size = f"{placed.decoded / 1e9:.3g} GB decoded"
        terminal.say(f"{placed.size} {name} images stay in their files ({size})")
    return placed


def _train(
    config: Config,
    origin: Origin,
    model: nn.Module,
    info: Info,
    samples: Samples,
    run_dir: Path,
    terminal: Terminal,
    record: Record,
) -> TrainingRun:
    """Train `model`, or go on where a run was; leaves it with the weights of `best.pt`."""
    parts = hold_out(samples, config.dataset.validation, config.seed)
    device = config.torch_device()
    train, validation = (
        _placed(part, device, name, terminal)
        for part, name in zip(parts, ("training", "validation"), strict=True)
    )
    trainer = Trainer(
        model, config.defense, config.optimizer, config.schedule, config.training,
        train=train, validation=validation, dataset=config.dataset,
        norm=config.norm, eps=config.eps, seed=config.seed, terminal=terminal,
        weight_perturbation=config.weight_perturbation, averaging=config.averaging,
    )  # fmt: skip
    about = {
        "num_classes": info.num_classes,
        "image_shape": list(info.image_shape),
        "config": origin.config,
        "names": dict(origin.names),
    }
    training = TrainingRun(
        trainer, run_dir, about, terminal, lambda epoch: record(of_epoch(epoch.row()), epoch.epoch)
    )
    if config.resume is not None:
        _resume(training, terminal)
    training.finish()
    return training


def _resume(training: TrainingRun, terminal: Terminal) -> None:
    """Take up `training` where the newest checkpoint of its directory has left it.

    Raises
    ------
    InputError
        If that was another training.
    """
    saved = distributed.from_main(lambda: newest_checkpoint(training.folder, terminal))
    if saved is None:
        terminal.say("no checkpoint was written yet: training begins anew")
        return
    other = [
        key for key, value in training.about["config"].items() if saved.config.get(key) != value
    ]
    if other:
        raise InputError(
            f"resume={training.folder} was trained under another configuration: "
            f"{', '.join(other)} differ"
        )
    training.restore(saved)
    position = training.trainer.position
    terminal.say(f"going on behind batch {position.batch} of epoch {position.epoch}")


def _inspect(
    config: Config,
    names: Mapping[str, str],
    model: nn.Module,
    is_foreign: bool,
    test: Samples,
    terminal: Terminal,
) -> None:
    """Say what makes the figures of an evaluation mean something else than they seem to."""
    x, y = model_checks.sample(test, config.evaluation.choose(test.size))
    model_checks.refuse_without_gradient(model, x, names["model"])
    for finding in model_checks.inspect(model, x, y, foreign=is_foreign):
        if finding.message:
            terminal.say(f"warning: {finding.message}")


def _evaluate(
    config: Config, model: nn.Module, test: Samples, run_dir: Path, terminal: Terminal
) -> Examined:
    at_once = config.evaluation.at_once(test.device)
    with refused_where_too_large("evaluation.batch_size", at_once):
        return examined(
            model, test, config.evaluation,
            norm=config.norm, eps=config.eps, seed=config.seed,
            folder=run_dir / f"{PIECES}{distributed.suffix()}",
            origin=(config.checkpoint, config.model, config.noise), terminal=terminal,
        )  # fmt: skip


def _report(
    config: Config, names: Mapping[str, str], results: Found, run_dir: Path, terminal: Terminal
) -> list[dict[str, Any]]:
    """Write and show what an evaluation found; returns the rows of `report.csv`."""
    report = results.ledger.report(config.norm, results.rows)
    shown = {**names, "defense": _combined(names)}
    for position, key in enumerate(("dataset", "model", "defense", "noise")):
        report.insert(position, key, shown[key])
    report.insert(4, "seed", config.seed)
    checks = [check._asdict() for check in results.audit.checks]
    if results.certificates:
        certified = [asdict(image) for image in results.certificates.images]
        write_csv(run_dir / CERTIFIED, certified)
    write_csv(run_dir / SAMPLES, results.ledger.samples())
    if config.evaluation.save_adversarial:
        write_arrays(run_dir / ADVERSARIAL, results.ledger.arrays())
    if results.audit.curve:
        write_csv(run_dir / CURVE, [point.as_dict() for point in results.audit.curve])
    if checks:
        write_csv(run_dir / AUDIT, checks)
    write_csv(run_dir / REPORT, report)
    terminal.report(report, f"{shown['defense']}, {names['model']} on {names['dataset']}")
    if results.certificates:
        curve = [point.row for point in results.certificates.audit.curve]
        terminal.certified(curve, results.certificates.theorem.paper)
    if checks:
        terminal.audit(checks)
    return [{str(key): value for key, value in row.items()} for row in report.to_dict("records")]


def _combined(names: Mapping[str, str]) -> str:
    """The defense with what it was combined with, such as trades+awp+ema."""
    companions = (names.get(group, NOTHING) for group in COMPANIONS)
    return "+".join([names["defense"], *(name for name in companions if name != NOTHING)])
