"""Clean and adversarial accuracy of a model on a split."""

import time
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from robusttrain.attacks import Attack, threat_of
from robusttrain.data import Samples, as_input
from robusttrain.evaluation.session import AttackResult, EvaluationSession, Predictions
from robusttrain.evaluation.settings import Evaluation
from robusttrain.evaluation.worst_points import WorstPoints
from robusttrain.models.modes import modes_restored
from robusttrain.report.ledger import Ledger, Outcome, Row
from robusttrain.runtime.progress import SILENT, Progress
from robusttrain.threat import Threat
from robusttrain.threat.balls import ball


class PassingOver(Enum):
    """Which images an attack passes over: those that are wrong already, in one of three senses."""

    misclassified = "without any attack"
    broken_within = "without or after an attack of the same threat model"
    broken = "without or after any attack"

    @classmethod
    def of(cls, settings: Evaluation) -> Self:
        """What an evaluation is set to."""
        if settings.union_only:
            return cls.broken
        return cls.broken_within if settings.survivors_only else cls.misclassified


def open_session(
    model: nn.Module, samples: Samples, settings: Evaluation, seed: int
) -> tuple[NDArray[np.int64], EvaluationSession]:
    """The positions of the images to evaluate, and the subject of the evaluation."""
    rows = settings.choose(samples.size)
    images, y = samples.take(rows).loaded()
    how = settings.at_once(images.device), settings.eot, settings.votes
    return rows.numpy(), EvaluationSession(model, as_input(images), y, *how, seed)


def evaluate(
    model: nn.Module,
    samples: Samples,
    settings: Evaluation,
    *,
    threat: Threat,
    seed: int,
    progress: Progress = SILENT,
) -> Ledger:
    """Attack `model` on the chosen images of `samples`; see `attack_all`.

    Mode and noise streams of the model are left as they were.
    """
    with modes_restored(model):
        model.eval()
        index, subject = open_session(model, samples, settings, seed)
        suite = settings.suite(subject.num_classes, subject.random)
        return attack_all(
            subject, index, suite, PassingOver.of(settings), threat=threat, progress=progress
        )


def attack_all(
    subject: EvaluationSession,
    index: NDArray[np.int64],
    suite: Mapping[str, Attack],
    passing_over: PassingOver,
    *,
    threat: Threat,
    progress: Progress = SILENT,
) -> Ledger:
    """Run the attacks of `suite` on the images of `subject` and score them on fresh passes.

    `index` says where in the test set the images are. An image that an attack passes over counts as
    broken by it and costs nothing: one that is misclassified by itself always is.
    A model that predicts at random is scored, clean or attacked, on the same draws for the same
    image; attacks see other draws. An attack that changes nothing therefore breaks nothing, and
    several attacks have no more luck than one. `threat` is stated for attacks that do not state
    their own; `progress` advances once an image and attack.
    """
    started = time.perf_counter()
    clean = subject.predict(subject.x)
    ledger = Ledger(
        index=index,
        label=subject.y.cpu().numpy(),
        prediction=clean.prediction,
        margin=clean.margin,
        seconds=time.perf_counter() - started,
        union_only=passing_over is PassingOver.broken,
    )
    stated = {name: threat_of(attack) or threat for name, attack in suite.items()}
    worst = {each: WorstPoints.of(subject, clean) for each in dict.fromkeys(stated.values())}
    for name, attack in suite.items():
        progress.show(name)
        own = stated[name]
        passed_over = _passed_over(ledger, passing_over, own)
        progress.advance(int(passed_over.sum()))
        started = time.perf_counter()
        rows, advance = np.flatnonzero(~passed_over), progress.advance
        crafted = subject.attack(attack, rows, name, threat=own, advance=advance)
        seen = subject.predict(crafted.x_adv)
        seconds = time.perf_counter() - started
        outcome = _outcome(subject, crafted, seen, ~passed_over, own, seconds)
        # What fell within another threat model has not fallen within this one.
        fallen = passed_over & ledger.worst_case(own)
        ledger.outcomes[name] = replace(outcome, broken=outcome.broken | fallen)
        for each, points in worst.items():
            if each.covers(own):
                points.offer(crafted.x_adv, seen)
    ledger.adversarial = {each: points.x_adv.cpu().numpy() for each, points in worst.items()}
    return ledger


def _passed_over(ledger: Ledger, which: PassingOver, threat: Threat) -> NDArray[np.bool_]:
    if which is PassingOver.broken:
        return ledger.union
    return ledger.worst_case(threat) if which is PassingOver.broken_within else ledger.misclassified


def rounded(subject: EvaluationSession, ledger: Ledger) -> list[Row]:
    """The rows `uint8`: accuracy on the attacked images when they are rounded to bytes."""
    return [
        _rounded(subject, ledger, threat, images)
        for threat, images in (ledger.adversarial or {}).items()
    ]


def _rounded(
    subject: EvaluationSession, ledger: Ledger, threat: Threat, images: NDArray[np.floating]
) -> Row:
    seen = subject.predict((torch.from_numpy(images).to(subject.x) * 255).round() / 255)
    broken = np.not_equal(seen.prediction, ledger.label)
    return Row.counted("uint8", threat, np.asarray(broken))


def _outcome(
    subject: EvaluationSession,
    crafted: AttackResult,
    seen: Predictions,
    attacked: NDArray[np.bool_],
    threat: Threat,
    seconds: float,
) -> Outcome:
    return Outcome(
        threat=threat,
        broken=np.not_equal(seen.prediction, subject.y.cpu().numpy()),
        margin=seen.margin,
        size=ball(Threat(threat.norm, 0)).norm(crafted.x_adv - subject.x).cpu().numpy(),
        seconds=seconds,
        attacked=attacked,
        forward_passes=crafted.forward_passes,
        backward_passes=crafted.backward_passes,
        non_finite=crafted.non_finite,
        invalid=crafted.invalid,
        prediction=seen.prediction,
    )
