"""A dry run: what a command would do, and about how long that would take on this machine.

Steps of training are measured. The passes of an evaluation are counted on a small linear network
that is robust within the radius: a robust image costs the most, since no search ends early.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from robusttrain import seeding
from robusttrain.data import Info, Split
from robusttrain.evaluation import Evaluation
from robusttrain.evaluation.pipeline import EvaluationCache, Plan, run_evaluation
from robusttrain.models.passes import Passes
from robusttrain.noise.layer import predicts_randomly
from robusttrain.runs.context import RunContext
from robusttrain.runs.inputs import Data, Inputs
from robusttrain.runs.training_attack import TRAIN_ATTACK
from robusttrain.runtime.peak_memory import peak_meter
from robusttrain.threat import Threat
from robusttrain.threat.balls import ball
from robusttrain.training.engine import Batch
from robusttrain.training.overfitting import probe
from robusttrain.training.trainer import Trainer

TITLE = "estimates; passes are forward plus backward"
AT_MOST = "at most "

# Batches that are measured, after one that is not: it allocates and compiles.
BATCHES = 3

# Images that the linear network is attacked on.
IMAGES = 4

# The radius at which the linear network breaks, as a multiple of `eps`.
BREAKS_AT = 1.2


class Estimate(NamedTuple):
    """A row of the table: images, passes an image in both directions, minutes, and peak MiB.

    `bound` is `AT_MOST` for passes and minutes that some images do not need.
    """

    stage: str
    images: str
    passes: float
    minutes: float
    memory: float
    bound: str = ""


class _Work(NamedTuple):
    """Passes an image of an evaluation, and the seconds of its attacks besides the passes."""

    forward: float
    backward: float
    seconds: float


class _Speed(NamedTuple):
    """Seconds an image of a pass forward, and of one back, and the batch that they are for."""

    forward: float
    backward: float
    batch: int

    def minutes(self, work: _Work, images: int) -> float:
        """The minutes that `work` takes on `images` images."""
        passes = images * (work.forward * self.forward + work.backward * self.backward)
        return (passes + math.ceil(images / self.batch) * work.seconds) / 60


def show(context: RunContext, inputs: Inputs, data: Data, trainer: Trainer | None) -> None:
    """Print a row for each stage of the run; `trainer` is None if nothing is trained."""
    names, terminal = context.origin.names, context.terminal
    weights = sum(parameter.numel() for parameter in inputs.model.parameters())
    terminal.say(f"{names['model']} with {weights:,} parameters, {names['dataset']}")
    rows = []
    if trainer is not None:
        attack = names.get(TRAIN_ATTACK)
        terminal.say(f"training: {names['defense']}, attack {attack}")
        rows.append(_training(context, trainer))
    if context.evaluates:
        suite = context.config.evaluation.attacks
        terminal.say(f"evaluation: {', '.join(suite)}")
        rows.append(_evaluation(context, inputs.model, data.test.size))
    cells = pd.DataFrame(
        {
            "stage": row.stage,
            "images": row.images,
            "passes an image": f"{row.bound}{row.passes:,.0f}",
            "minutes": f"{row.bound}{row.minutes:.1f}",
            "peak MiB": f"{row.memory:,.0f}",
        }
        for row in rows
    )
    terminal.table(cells, TITLE, cells.columns)
    terminal.say("dry run: nothing was trained, and nothing was written")


def _training(context: RunContext, trainer: Trainer) -> Estimate:
    settings, engine, epochs = trainer.settings, trainer.engine, trainer.settings.epochs
    # As in the last epoch, when every schedule has ended.
    last = max(1, epochs)
    defense = settings.curriculum.at(trainer.defense, last, last, 1.0)
    order = trainer.order.epoch(engine.streams["batches"])
    first, *others = [Batch(x, y, last) for x, y in islice(order, 1 + BATCHES)]
    measured, images = others or [first], sum(len(batch.y) for batch in others or [first])

    def train(taken: Sequence[Batch]) -> None:
        for batch in taken:
            engine.train_batch_within_memory(defense, batch, trainer.history)
        _wait_for(context.device)

    trainer.model.train()
    peak = peak_meter(context.device)
    train([first])
    engine.passes, started = Passes(), time.perf_counter()
    train(measured)
    seconds, memory = (time.perf_counter() - started) / images, peak()
    minutes = epochs * (seconds * engine.images / 60 + _validation(context, trainer))
    size = f"{epochs} x {engine.images:,}"
    return Estimate("training", size, engine.passes.total / images, minutes, memory)


def _validation(context: RunContext, trainer: Trainer) -> float:
    """The minutes of the validation after an epoch, and of the search for overfitting."""
    size = trainer.settings.batch_size
    speed = _speed(trainer.model, context.info, context.device, size)
    attacks = [
        (trainer.validation.size, trainer.settings.validation_attack),
        (trainer.probe_images.size, probe(trainer.threat)),
    ]
    minutes = 0.0
    for images, attack in attacks:
        if images and attack is not None:
            suite = trainer.validate.searches("attack", attack)
            work = _work(context, Evaluation(suite, batch_size=size))
            minutes += speed.minutes(work, images)
    return minutes


def _evaluation(context: RunContext, model: nn.Module, size: int) -> Estimate:
    settings = context.config.evaluation
    images = len(settings.choose(size))
    batch = min(images, settings.at_once(context.device))
    peak = peak_meter(context.device)
    speed = _speed(model, context.info, context.device, batch)
    memory = peak()
    plain = replace(
        settings, certification=None, radii=None, verify=False, verification=None,
        save_adversarial=False,
    )  # fmt: skip
    suite = _work(context, replace(plain, audit=False))
    audited = _work(context, plain)
    audit = _Work(*(whole - part for whole, part in zip(audited, suite, strict=True)))
    if settings.radii is not None:
        suite = _work(context, replace(plain, audit=False, radii=settings.radii))
    draws = settings.eot if predicts_randomly(model) else 1
    minutes = draws * (
        speed.minutes(suite, images) + speed.minutes(audit, len(settings.probed(images)))
    )
    passes = draws * (suite.forward + suite.backward)
    passes += draws * (audit.forward + audit.backward) * len(settings.probed(images)) / images
    if settings.certification is not None:
        votes = settings.certification.n0 + settings.certification.n
        passes, minutes = passes + votes, minutes + images * votes * speed.forward / 60
    if settings.verification is not None:
        minutes += images * settings.verification.seconds / 60
    return Estimate("evaluation", f"{images:,} of {size:,}", passes, minutes, memory, AT_MOST)


def _work(context: RunContext, settings: Evaluation) -> _Work:
    """The work of an evaluation for each image, if the network is robust."""
    config, info = context.config, context.info
    subject = robust_network(config.evaluated, info)
    images = torch.full((IMAGES, *info.image_shape), 128, dtype=torch.uint8)
    samples = Split(images, torch.zeros(IMAGES, dtype=torch.long))
    few = replace(settings, samples=IMAGES, indices=None, first=None, probe_samples=IMAGES)
    passes, started = Passes(), time.perf_counter()
    with TemporaryDirectory() as folder, passes.counting(subject):
        cache = EvaluationCache(Path(folder), None)
        run_evaluation(
            subject,
            samples,
            Plan(few, config.threat, config.seed, config.evaluated),
            cache,
            context.terminal,
        )
    seconds = time.perf_counter() - started
    return _Work(passes.forward / IMAGES, passes.backward / IMAGES, seconds)


class _Linear(nn.Module):
    """Logits 0 for the first class, and a <w, x - 1/2> - m with a <= 1 for each other one.

    The grey image keeps the first class where the radius times the dual norm of w is at most m.
    """

    def __init__(self, direction: Tensor, slopes: Tensor, margin: float) -> None:
        super().__init__()
        self.margin = margin
        self.direction, self.slopes = nn.Parameter(direction), nn.Parameter(slopes)

    def forward(self, x: Tensor) -> Tensor:
        along = (x - 0.5).flatten(1) @ self.direction
        others = along.unsqueeze(1) * self.slopes - self.margin
        return torch.cat([torch.zeros_like(others[:, :1]), others], 1)


def robust_network(threats: Sequence[Threat], info: Info) -> nn.Module:
    """A linear network that is robust at a grey image, a little farther than all `threats` go."""
    draws = seeding.generator_for(0, "dry run")
    direction = torch.randn(1, *info.image_shape, generator=draws)
    slopes = torch.linspace(0.5, 1, info.num_classes - 1)
    gains = [max(each.eps, 0.01) * float(ball(each).dual_norm(direction)) for each in threats]
    direction /= max(gains)
    return _Linear(direction.flatten(), slopes, BREAKS_AT)


def _speed(model: nn.Module, info: Info, device: torch.device, batch: int) -> _Speed:
    """The speed of `model` in eval mode with `batch` images, in the best of three tries."""
    model.eval()
    x = torch.rand(batch, *info.image_shape).to(device).requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            model(x)

    def both() -> None:
        torch.autograd.grad(model(x).sum(), x)

    one, two = (_seconds(action, device) / batch for action in (forward, both))
    return _Speed(one, max(0.0, two - one), batch)


def _seconds(action: Callable[[], None], device: torch.device) -> float:
    tries = []
    for _ in range(3):
        started = time.perf_counter()
        action()
        _wait_for(device)
        tries.append(time.perf_counter() - started)
    return min(tries)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
