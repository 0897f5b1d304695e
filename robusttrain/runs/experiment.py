"""A run from top to bottom: inputs, preflight, data, training, evaluation, report, manifest."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robusttrain.checkpoints.checkpoint import differing
from robusttrain.checkpoints.external import ExternalModel
from robusttrain.config.build import named_in
from robusttrain.config.run_config import Config, Stage
from robusttrain.data import Extended, Extra, ImageIndex, Info, Samples, hold_out
from robusttrain.errors import InputError, returned
from robusttrain.evaluation import model_checks
from robusttrain.evaluation.pipeline import (
    EvaluationCache,
    EvaluationResult,
    FinishedEvaluation,
    Plan,
    run_evaluation,
)
from robusttrain.evaluation.requirements import Baseline, requirements, rows_in, threats_of
from robusttrain.loggers import Logger, Record, epoch_figures, report_figures
from robusttrain.loggers.none import NoLogger
from robusttrain.models.passes import Passes
from robusttrain.report.files import read_csv, write_json
from robusttrain.report.identity import digests, results_in
from robusttrain.report.radii import medians
from robusttrain.report.result import Result, rows_of
from robusttrain.report.terminal import Terminal
from robusttrain.run_directory import AUDIT, EVALUATION_CACHE, MANIFEST, RADII, RESULT
from robusttrain.runs import dry_run
from robusttrain.runs.context import Origin, RunContext
from robusttrain.runs.cost import Costs, Work
from robusttrain.runs.device import device_of
from robusttrain.runs.inputs import (
    Data,
    Inputs,
    data_of,
    has_own_weights,
    inputs_of,
    of_each,
    placed,
)
from robusttrain.runs.manifest import manifest
from robusttrain.runs.outcome import Outcome, strictly, uncontradicted
from robusttrain.runs.preflight import check_inputs, inspect_model
from robusttrain.runs.rehearsal import rehearse
from robusttrain.runs.results import result_of
from robusttrain.runs.run_directories import clear
from robusttrain.runtime import distributed
from robusttrain.runtime.determinism import deterministic, flags
from robusttrain.runtime.out_of_memory import refused_where_too_large
from robusttrain.training import trainable
from robusttrain.training.checkpointing import TrainingRun, newest_checkpoint, surplus
from robusttrain.training.diagnostics import findings, summary
from robusttrain.training.recipe import Recipe, TrainingData
from robusttrain.training.trainable import partly_frozen
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
    context, inputs, data, baseline = _ready(context)
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
            settings, classes = config.training, context.info.num_classes
            with (
                costs.measuring(Stage.train) as done,
                partly_frozen(inputs.model, settings, classes, inputs.defense),
            ):
                training = _train(context, inputs, data, record)
                done(_training_work(training))
            best = training.best
        if context.evaluates:
            passes = Passes()
            with costs.measuring(Stage.evaluate) as done, passes.counting(inputs.model):
                _evaluate(context, inputs, data, record, best.epoch if best else 0)
                done(Work(len(context.config.evaluation.choose(data.test.size)), passes))
    if distributed.is_main():
        for stage, seconds in costs.seconds.items():
            terminal.detail(f"{stage}: {seconds:.1f} s")
        _judge(context, training, baseline)
        course = summary(training.epochs) if training else None
        content = manifest(origin, device, data, costs, course, switches)
        content["weights"] = training.weights if training else inputs.weights
        _conclude(context, content)
    return best.val_robust_accuracy if best else None


def _baseline(context: RunContext) -> Baseline | None:
    """The run of `evaluation.baseline`, if one is given and something is evaluated."""
    settings = context.config.evaluation
    if settings.baseline is None or not context.evaluates:
        return None
    baseline = Baseline.read(Path(settings.baseline))
    threats = threats_of(settings, context.config.threat)
    baseline.refuse_other_threats(context.origin.names["dataset"], threats)
    return baseline


def _judge(context: RunContext, training: TrainingRun | None, baseline: Baseline | None) -> None:
    """Write `result.json`, and print which requirements are not met."""
    config, run_dir = context.config, context.run_dir
    rows = rows_in(run_dir) if context.evaluates else []
    found = None
    if training is not None:
        found = findings(training.epochs, context.info.num_classes, config.training.epochs)
    required = [*requirements(config.evaluation, rows, baseline)] if context.evaluates else []
    if config.evaluation.strict:
        required += strictly(rows, found)
    if context.evaluates and config.evaluation.proofs is not None:
        key = "evaluation.verify" if config.evaluation.verify else "evaluation.verification"
        required += uncontradicted(key, rows_of(read_csv(run_dir / AUDIT)))
    radii = medians(read_csv(run_dir / RADII)) if context.evaluates else []
    outcome = Outcome(rows, found, required, radii)
    content = outcome.content(context.origin.names, config.seed, _kept(context))
    write_json(run_dir / RESULT, content)
    for line in outcome.unmet:
        context.terminal.say_always(line)


def _describe(context: RunContext, model: nn.Module, data: Data) -> None:
    """Print what works on what, if the terminal is verbose."""
    weights, say = sum(weight.numel() for weight in model.parameters()), context.terminal.detail
    say(f"device {context.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    say(f"model: {weights} parameters, {sum(1 for _ in model.modules())} modules")
    shape = " x ".join(map(str, context.info.image_shape))
    for name, samples in (("training", data.train), ("test", data.test)):
        digest = data.digests[name.removesuffix("ing")]
        say(f"{name} set: {samples.size} images of {shape}, digest {digest[:12]}")
    if data.extra is not None:
        say(f"extra images: {data.extra.size}, digest {data.digests['extra'][:12]}")


def estimate(config: Config, origin: Origin, terminal: Terminal) -> None:
    """Print what `run` would do with this configuration, and what it would cost; write nothing.

    Raises
    ------
    InputError
        As `run`.
    """
    context = _context(config, origin, Path(), terminal)
    context, inputs, data, _ = _ready(context)
    if not context.trains:
        dry_run.show(context, inputs, data, None)
        return
    classes = context.info.num_classes
    with partly_frozen(inputs.model, config.training, classes, inputs.defense):
        dry_run.show(context, inputs, data, trainer_of(context, inputs, data.train, data.extra))


def _context(config: Config, origin: Origin, run_dir: Path, terminal: Terminal) -> RunContext:
    config.logger.check()
    device = device_of(config.device)
    info = returned("dataset.info", config.dataset.info(), Info)
    return RunContext(config, origin, info, device, run_dir, terminal)


def _ready(context: RunContext) -> tuple[RunContext, Inputs, Data, Baseline | None]:
    """The model on its device, tried on a few images; the data; and the run to compare with.

    In the returned context, the images to evaluate are rows of the test set.
    """
    baseline = _baseline(context)
    inputs = inputs_of(context)
    check_inputs(context, inputs)
    inputs.model.to(context.device)
    rehearse(context, inputs)
    data = data_of(context)
    if context.evaluates:
        context = context.located(data.images.positions)
    if baseline is not None:
        chosen = data.images.positions[context.config.evaluation.choose(data.test.size)]
        counted_in = data.images.counted_in
        baseline.refuse_other_images(data.digests["test"], chosen.tolist(), counted_in)
    _describe(context, inputs.model, data)
    return context, inputs, data, baseline


def _conclude(context: RunContext, content: Mapping[str, Any]) -> None:
    """Write the manifest, and remove the checkpoints that the run needs no longer."""
    folder = context.run_dir
    write_json(folder / MANIFEST, {**content, "files": digests(folder, _surplus(context))})
    # Last: a run without a manifest resumes from its checkpoints.
    for name in _surplus(context):
        (folder / name).unlink(missing_ok=True)


def _surplus(context: RunContext) -> tuple[str, ...]:
    return surplus(context.config.training.keep) if context.trains else ()


def _kept(context: RunContext) -> list[str]:
    """The names of the result files that the run leaves."""
    return [name for name in results_in(context.run_dir) if name not in _surplus(context)]


def _recording(logger: Logger, run_dir: Path, origin: Origin) -> AbstractContextManager[Record]:
    opened: object = logger.record(run_dir, origin.parameters())
    return returned("logger.record", opened, AbstractContextManager)  # type: ignore[type-abstract]


def _train(context: RunContext, inputs: Inputs, data: Data, record: Record) -> TrainingRun:
    """Train the model, or resume its training; it ends with the weights of `best.pt`."""
    config, terminal = context.config, context.terminal
    trainer = trainer_of(context, inputs, data.train, data.extra)
    metadata = {
        "num_classes": context.info.num_classes,
        "image_shape": list(context.info.image_shape),
        "class_names": list(context.info.class_names),
        "config": context.origin.config,
        "names": dict(context.origin.names),
    }
    training = TrainingRun(
        trainer, context.run_dir, metadata, terminal,
        lambda epoch: record(epoch_figures(epoch.row()), epoch.epoch), inputs.weights,
    )  # fmt: skip
    if config.resume is not None:
        _resume(training, context)
    training.finish()
    return training


def trainer_of(
    context: RunContext, inputs: Inputs, samples: Samples, others: Samples | None = None
) -> Trainer:
    """The trainer of a run, which has not started yet; its model is `partly_frozen`.

    `others` are extra images.
    """
    config, terminal = context.config, context.terminal
    if config.training.trainable != "all":
        terminal.say(trainable.summary(inputs.model, config.training.trainable))
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
    extra = None
    if isinstance(config.dataset, Extended) and others is not None:
        ready = placed(others, context.device, "extra", terminal)
        extra = Extra(ready, config.dataset.extra_share, config.seed)
    data = TrainingData(train, validation, config.dataset, extra)
    return Trainer(inputs.model, recipe, data, config.threat, seed=config.seed, terminal=terminal)


def _training_work(training: TrainingRun) -> Work:
    """The work in all epochs, those before an interruption included."""
    images = len(training.epochs) * training.trainer.engine.images
    seconds = sum(epoch.seconds for epoch in training.epochs)
    return Work(images, training.trainer.engine.passes, seconds)


def _resume(training: TrainingRun, context: RunContext) -> None:
    """Restore `training` from the newest checkpoint in its directory.

    Raises
    ------
    InputError
        If the checkpoint has another configuration.
    """
    terminal = context.terminal
    saved = distributed.broadcast(lambda: newest_checkpoint(training.folder, terminal))
    if saved is None:
        if has_own_weights(context) and context.config.initial_weights.weights is not None:
            allowed = "start the run again"
            problem = "has no checkpoint that can be read, and its model is not new"
            raise InputError("resume", training.folder, allowed, problem)
        terminal.say("no checkpoint was written yet: starting from scratch")
        return
    other = differing(training.metadata["config"], saved.config)
    if other:
        problem = "was trained with another configuration"
        raise InputError("resume", training.folder, f"{', '.join(other)} differ", problem)
    training.restore(saved)
    position = training.trainer.position
    terminal.say(f"resuming after batch {position.batch} of epoch {position.epoch}")


def _evaluate(context: RunContext, inputs: Inputs, data: Data, record: Record, epoch: int) -> None:
    """Evaluate the model on the test set and report; its weights are those after `epoch`."""
    config = context.config
    folder = context.run_dir / f"{EVALUATION_CACHE}{distributed.suffix()}"
    cache = EvaluationCache(folder, (config.checkpoint, config.model, config.noise))
    is_foreign = isinstance(inputs.given, ExternalModel)
    finished = examined(context, inputs.model, data.test, cache, is_foreign=is_foreign)
    if finished.found is not None:
        result = reported(context, finished.found, data.images)
        result.write(context.run_dir)
        result.show(context.terminal)
        record(report_figures(rows_of(result.table)), epoch)
    distributed.barrier()
    # Only now that every result is written: an interrupted evaluation resumes from the pieces.
    finished.pieces.remove()


def examined(
    context: RunContext,
    model: nn.Module,
    samples: Samples,
    cache: EvaluationCache | None,
    *,
    is_foreign: bool,
) -> FinishedEvaluation:
    """Inspect the model, which may come from elsewhere, and evaluate it on `samples`."""
    config, test = context.config, samples.to(context.device)
    batch = model_checks.sample(test, config.evaluation.choose(test.size))
    inspect_model(model, batch, is_foreign, context.terminal)
    with refused_where_too_large("evaluation.batch_size", config.evaluation.at_once(test.device)):
        plan = Plan(config.evaluation, config.threat, config.seed, config.evaluated)
        return run_evaluation(model, test, plan, cache, context.terminal)


def reported(context: RunContext, found: EvaluationResult, images: ImageIndex) -> Result:
    """The tables of an evaluation; `images` says how test images are found again."""
    config = context.config
    return result_of(found, context.origin.names, config.threat, config.seed, images)
