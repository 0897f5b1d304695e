"""A run from top to bottom: data, model, training, evaluation, report."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from omegaconf import OmegaConf
from torch import nn

from robusttrain.checkpoints import external
from robusttrain.checkpoints.external import Foreign
from robusttrain.config.run_config import Config, Stage
from robusttrain.config.schema import GROUPS
from robusttrain.data import Info, Samples, hold_out
from robusttrain.defenses import Selective, WithModels
from robusttrain.errors import InputError
from robusttrain.evaluation.pipeline import Examined, examined
from robusttrain.loggers import Record, flat, of_epoch, of_report
from robusttrain.loggers.none import NoLogger
from robusttrain.report.files import write_json
from robusttrain.report.terminal import Terminal
from robusttrain.run_directory import (
    MANIFEST,
    PIECES,
)
from robusttrain.runs.inputs import digests, loaded, model_of, other_model, placed
from robusttrain.runs.manifest import manifest
from robusttrain.runs.preflight import check_evaluation, inspect_model
from robusttrain.runs.results import report_results
from robusttrain.runtime import distributed
from robusttrain.runtime.determinism import deterministic, flags
from robusttrain.runtime.out_of_memory import refused_where_too_large
from robusttrain.threat import Threat
from robusttrain.training.checkpointing import TrainingRun, newest_checkpoint
from robusttrain.training.diagnostics import summary
from robusttrain.training.metrics import Epoch
from robusttrain.training.recipe import Recipe, TrainingData
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
        config.defense = config.defense.with_models(partial(other_model, config, info))
    model = model_of(config, info, given, terminal)
    if Stage.train in config.stages and isinstance(config.defense, Selective):
        config.defense.refuse_unfit(model, info.image_shape)
    check_evaluation(config, model, info, given, terminal)
    seconds: dict[str, float] = {}
    train, test = loaded(config, origin.names["dataset"], device)
    digest = digests(train, test, terminal)
    if Stage.evaluate in config.stages:
        # An image that cannot be decoded is told of before the work, not after days of training.
        test = placed(test, "cpu", "test", terminal)
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
            inspect_model(config, origin.names, model, isinstance(given, Foreign), test, terminal)
            results = _evaluate(config, model, test, run_dir, terminal)
            if results.found is not None:
                report = report_results(config, origin.names, results.found, run_dir, terminal)
                record(of_report(report), best.epoch if best else 0)
            distributed.together()
            results.pieces.remove()
            seconds["evaluate"] = time.perf_counter() - started
    if distributed.is_main():
        content = manifest(
            origin.resolved(), origin.overrides, device, digest, seconds,
            training=course, determinism=repeatable,
        )  # fmt: skip
        write_json(run_dir / MANIFEST, content)
    return best.val_robust_accuracy if best else None


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
        placed(part, device, name, terminal)
        for part, name in zip(parts, ("training", "validation"), strict=True)
    )
    recipe = Recipe(
        config.defense, config.optimizer, config.schedule, config.training,
        config.weight_perturbation, config.averaging,
    )  # fmt: skip
    data = TrainingData(train, validation, config.dataset)
    threat = Threat(config.norm, config.eps)
    trainer = Trainer(model, recipe, data, threat, seed=config.seed, terminal=terminal)
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
