"""A run from top to bottom: inputs, preflight, data, training, evaluation, report, manifest."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn

from robusttrain.checkpoints.checkpoint import differing
from robusttrain.checkpoints.external import ExternalModel
from robusttrain.config.build import named_in
from robusttrain.config.run_config import Config, Stage
from robusttrain.data import FromFiles, Info, Samples, hold_out
from robusttrain.errors import InputError, returned
from robusttrain.evaluation import model_checks
from robusttrain.evaluation.pipeline import (
    EvaluationCache,
    EvaluationResult,
    FinishedEvaluation,
    Plan,
    run_evaluation,
)
from robusttrain.loggers import Figures, Logger, Record, epoch_figures, report_figures
from robusttrain.loggers.none import NoLogger
from robusttrain.models.passes import Passes
from robusttrain.report.files import write_json
from robusttrain.report.identity import digests
from robusttrain.report.terminal import Terminal
from robusttrain.run_directory import EVALUATION_CACHE, MANIFEST
from robusttrain.runs import dry_run
from robusttrain.runs.context import Origin, RunContext
from robusttrain.runs.cost import Costs, Work
from robusttrain.runs.device import device_of
from robusttrain.runs.inputs import Data, Inputs, data_of, inputs_of, of_each, placed
from robusttrain.runs.manifest import manifest
from robusttrain.runs.preflight import check_inputs, inspect_model
from robusttrain.runs.rehearsal import rehearse
from robusttrain.runs.results import report_of, show_results, write_results
from robusttrain.runs.run_directories import clear
from robusttrain.runtime import distributed
from robusttrain.runtime.determinism import deterministic, flags
from robusttrain.runtime.out_of_memory import refused_where_too_large
from robusttrain.training.checkpointing import TrainingRun, newest_checkpoint, surplus
from robusttrain.training.diagnostics import summary
from robusttrain.training.recipe import Recipe, TrainingData
from robusttrain.training.trainer import Trainer


def run(config: Config, origin: Origin, run_dir: Path, terminal: Terminal) -> float | None:
    """Train and evaluate according to `config.stages`; write the results to `run_dir`.

    With several processes, only the first one writes.

    Returns the robust accuracy of `best.pt` on the validation split, which a search over settings
    may maximise without touching the test set; None if it was not measured.

    Raises
    ------
    InputError
        If the components do not fit together, before data is loaded; or if data cannot be read.
    NonFiniteLossError
        If training diverges; the results of earlier epochs stay on disk.
    """
    context = _context(config, origin, run_dir, terminal)
    inputs, data = _ready(context)
    device = context.device
    if distributed.is_main():
        clear(run_dir, resumed=config.resume is not None)
    logger, costs = config.logger if distributed.is_main() else NoLogger(), Costs(device)
    training = best = None
    with (
        deterministic(config.deterministic),
        _recording(logger, run_dir, origin) as record,
    ):
        switches = flags()
        if context.trains:
            with costs.measuring(Stage.train) as done:
                training = _train(context, inputs, data.train, record)
                done(_training_work(training))
            best = training.best
        if context.evaluates:
            passes = Passes()
            with costs.measuring(Stage.evaluate) as done, passes.counting(inputs.model):
                _evaluate(context, inputs, data.test, record, best.epoch if best else 0)
                done(Work(len(config.evaluation.choose(data.test.size)), passes))
    if distributed.is_main():
        course = summary(training.epochs) if training else None
        content = manifest(origin, device, data, costs, course, switches)
        _conclude(context, content)
    return best.val_robust_accuracy if best else None


def estimate(config: Config, origin: Origin, terminal: Terminal) -> None:
    """Print what `run` would do with this configuration, and what it would cost; write nothing.

    Raises
    ------
    InputError
        As `run`.
    """
    context = _context(config, origin, Path(), terminal)
    inputs, data = _ready(context)
    trainer = _trainer(context, inputs, data.train) if context.trains else None
    dry_run.show(context, inputs, data, trainer)


def _context(config: Config, origin: Origin, run_dir: Path, terminal: Terminal) -> RunContext:
    config.logger.check()
    device = device_of(config.device)
    info = returned("dataset.info", config.dataset.info(), Info)
    return RunContext(config, origin, info, device, run_dir, terminal)


def _ready(context: RunContext) -> tuple[Inputs, Data]:
    """The model on its device, tried on a few images, and the data."""
    inputs = inputs_of(context)
    check_inputs(context, inputs)
    inputs.model.to(context.device)
    rehearse(context, inputs)
    return inputs, data_of(context)


def _conclude(context: RunContext, content: Mapping[str, Any]) -> None:
    """Write the manifest, and remove the checkpoints that the run needs no longer."""
    folder = context.run_dir
    passing = surplus(context.config.training.keep) if context.trains else ()
    write_json(folder / MANIFEST, {**content, "files": digests(folder, passing)})
    # Last: a run without a manifest resumes from its checkpoints.
    for name in passing:
        (folder / name).unlink(missing_ok=True)


def _recording(logger: Logger, run_dir: Path, origin: Origin) -> AbstractContextManager[Record]:
    opened: object = logger.record(run_dir, origin.parameters())
    return returned("logger.record", opened, AbstractContextManager)  # type: ignore[type-abstract]


def _train(context: RunContext, inputs: Inputs, samples: Samples, record: Record) -> TrainingRun:
    """Train the model, or resume its training; it ends with the weights of `best.pt`."""
    config, terminal = context.config, context.terminal
    trainer = _trainer(context, inputs, samples)
    metadata = {
        "num_classes": context.info.num_classes,
        "image_shape": list(context.info.image_shape),
        "class_names": list(context.info.class_names),
        "config": context.origin.config,
        "names": dict(context.origin.names),
    }
    training = TrainingRun(
        trainer, context.run_dir, metadata, terminal,
        lambda epoch: record(epoch_figures(epoch.row()), epoch.epoch),
    )  # fmt: skip
    if config.resume is not None:
        _resume(training, terminal)
    training.finish()
    return training


def _trainer(context: RunContext, inputs: Inputs, samples: Samples) -> Trainer:
    """The trainer of a run, which has not started yet."""
    config, terminal = context.config, context.terminal
    with named_in(context.origin.config, "dataset"):
        parts = hold_out(samples, config.dataset.validation, config.seed)
    train, validation = of_each(
        dict(zip(("training", "validation"), parts, strict=True)),
        lambda name, part: placed(part, context.device, name, terminal),
    ).values()
    recipe = Recipe(
        inputs.defense, config.optimizer, config.schedule, config.training,
        config.weight_perturbation, config.averaging,
    )  # fmt: skip
    data = TrainingData(train, validation, config.dataset)
    return Trainer(inputs.model, recipe, data, config.threat, seed=config.seed, terminal=terminal)


def _training_work(training: TrainingRun) -> Work:
    """The work in all epochs, those before an interruption included."""
    images = len(training.epochs) * training.trainer.train.size
    seconds = sum(epoch.seconds for epoch in training.epochs)
    return Work(images, training.trainer.engine.passes, seconds)


def _resume(training: TrainingRun, terminal: Terminal) -> None:
    """Restore `training` from the newest checkpoint in its directory.

    Raises
    ------
    InputError
        If the checkpoint has another configuration.
    """
    saved = distributed.broadcast(lambda: newest_checkpoint(training.folder, terminal))
    if saved is None:
        terminal.say("no checkpoint was written yet: starting from scratch")
        return
    other = differing(training.metadata["config"], saved.config)
    if other:
        problem = "was trained with another configuration"
        raise InputError("resume", training.folder, f"{', '.join(other)} differ", problem)
    training.restore(saved)
    position = training.trainer.position
    terminal.say(f"resuming after batch {position.batch} of epoch {position.epoch}")


def _evaluate(
    context: RunContext, inputs: Inputs, samples: Samples, record: Record, epoch: int
) -> None:
    """Evaluate the model on `samples` and report; its weights are those after `epoch`."""
    config = context.config
    test = samples.to(context.device)
    batch = model_checks.sample(test, config.evaluation.choose(test.size))
    is_foreign = isinstance(inputs.given, ExternalModel)
    inspect_model(inputs.model, batch, is_foreign, context.terminal)
    results = _examined(context, inputs.model, test)
    if results.found is not None:
        record(_report(context, results.found), epoch)
    distributed.barrier()
    # Only now that every result is written: an interrupted evaluation resumes from the pieces.
    results.pieces.remove()


def _examined(context: RunContext, model: nn.Module, test: Samples) -> FinishedEvaluation:
    config = context.config
    with refused_where_too_large("evaluation.batch_size", config.evaluation.at_once(test.device)):
        plan = Plan(config.evaluation, config.threat, config.seed)
        folder = context.run_dir / f"{EVALUATION_CACHE}{distributed.suffix()}"
        workplace = EvaluationCache(folder, (config.checkpoint, config.model, config.noise))
        return run_evaluation(model, test, plan, workplace, context.terminal)


def _report(context: RunContext, found: EvaluationResult) -> Figures:
    """Write and print the results; returns the figures for a logger."""
    names = context.origin.names
    report = report_of(found, names, context.config.threat, context.config.seed)
    dataset = context.config.dataset
    files = dataset.test_files() if isinstance(dataset, FromFiles) else None
    write_results(found, report, files, context.run_dir)
    show_results(found, report, names, context.terminal)
    rows = report.to_dict("records")
    return report_figures([{str(key): value for key, value in row.items()} for row in rows])
