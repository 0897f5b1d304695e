"""A rehearsal of a run: the passes that it makes through its model, tried on one or two images."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from robusttrain import seeding
from robusttrain.attacks import (
    Attack,
    Attacking,
    cross_entropy,
    fitted,
    frugal,
    with_attack,
)
from robusttrain.attacks.ball_attack import BallAttack
from robusttrain.attacks.model_view import buffers_copied, frozen
from robusttrain.data import Info
from robusttrain.defenses import Defense, Replayed, Stateful
from robusttrain.errors import InputError
from robusttrain.evaluation import model_checks
from robusttrain.models import described, reason_of
from robusttrain.models.modes import modes_restored
from robusttrain.noise.control import drawing_from
from robusttrain.runs.context import RunContext
from robusttrain.runs.inputs import Inputs
from robusttrain.runs.training_attack import OWN_ATTACK
from robusttrain.training.precision import Precision
from robusttrain.training.settings import Training
from robusttrain.training.trainable import partly_frozen

T = TypeVar("T")

# Images in the smallest batch of a training, unless `batch_size` is 1 (see `data.batches`).
SMALLEST = 2


def rehearse(context: RunContext, inputs: Inputs) -> None:
    """Try a step of training, and the input gradient of one image in eval mode.

    Attacks that are not those of robusttrain are tried on this image, too. Weights, gradients,
    buffers, modes and random streams stay as they are. All attacks take a few steps only.

    Raises
    ------
    InputError
        If `training.trainable` does not fit the model, if a pass fails or returns anything but
        logits, if an attack fails, or if training has to differentiate a gradient, which compiled
        models cannot do. The message names the key.
    """
    names, device = context.origin.names, context.device
    subject = _Subject(inputs.model, names, context.info, device)
    with _restored(inputs.model, device):
        if context.trains:
            settings, classes = context.config.training, context.info.num_classes
            with partly_frozen(inputs.model, settings, classes, inputs.defense):
                subject.train(inputs.defense, settings)
        subject.differentiate()
        for place, attack in _searches(context).items():
            subject.meet(attack, place)


def _searches(context: RunContext) -> dict[str, Attack]:
    """The attacks of validation and evaluation, by their keys."""
    training, evaluation = context.config.training, context.config.evaluation
    found: dict[str, Attack] = {}
    if context.trains and training.validation_attack is not None:
        found["training.validation_attack"] = training.validation_attack
    if context.evaluates:
        found |= {f"evaluation.attacks.{name}": own for name, own in evaluation.attacks.items()}
        if evaluation.probe is not None:
            found["evaluation.probe"] = evaluation.probe
    return found


@dataclass(frozen=True)
class _Subject:
    """A model on its device, the options of the run by group, and the images that it takes."""

    model: nn.Module
    names: Mapping[str, str]
    info: Info
    device: torch.device

    @property
    def name(self) -> str:
        """The option of `model=`."""
        return self.names["model"]

    def train(self, defense: Defense, settings: Training) -> None:
        """Try a step of training with `defense`."""
        place = OWN_ATTACK.partition("@")[2] if OWN_ATTACK in self.names else "attack"
        step = partial(self._step, defense, settings.precision, place)
        option = self.names["defense"]
        self.model.train()
        self._forward(SMALLEST, "train")
        with _second_derivatives(self.model) as needed:
            problem = f"cannot be trained with defense={option}"
            step(SMALLEST, InputError("model", self.name, "", problem))
        if settings.compile and any(needed):
            allowed = f"false with defense={option}: compiled models have no second derivatives"
            raise InputError("training.compile", "true", allowed)
        if settings.batch_size == 1:
            problem = f"is too small for model={self.name}"
            step(1, InputError("batch_size", 1, "take 2 or more; ", problem))

    def differentiate(self) -> None:
        """Try the input gradient of one image, as attacks in eval mode use it."""
        self.model.eval()
        x, _ = self._images(1)
        with frozen(self.model), torch.enable_grad():
            self._forward(1, "eval")
            model_checks.refuse_without_gradient(self.model, x, self.name)
            point = x.requires_grad_()
            failed = InputError("model", self.name, "", "has no gradient that attacks can use")
            _tried(lambda: torch.autograd.grad(self.model(point).sum(), point), failed)

    def meet(self, attack: Attack, place: str) -> None:
        """Try the attack at the key `place` on one image, unless it searches a ball.

        Those searches are made of passes that were tried.
        """
        if isinstance(attack, BallAttack):
            return
        x, y = self._images(1)
        generator = seeding.generator_for(0, "rehearsal", self.device)
        failed = InputError(place, problem=f"cannot attack model={self.name}")

        def search() -> None:
            brief = frugal(fitted(attack, self.info.num_classes))
            brief(self.model, x, y, generator=generator)

        _tried(search, failed, place)

    def _forward(self, count: int, mode: str) -> None:
        x, _ = self._images(count)
        images = "1 image" if count == 1 else f"{count} images"
        failed = InputError("model", self.name, "", f"fails for {images} in {mode} mode")
        with torch.no_grad():
            output = _tried(lambda: self.model(x), failed)
        shape = (count, self.info.num_classes)
        if not isinstance(output, Tensor) or output.shape != shape:
            problem = f"returns {described(output)} for {images} in {mode} mode"
            allowed = f"it must return logits of shape {shape}, in train and in eval mode"
            raise InputError("model", self.name, allowed, problem)

    def _step(
        self, defense: Defense, precision: Precision, place: str, count: int, failed: InputError
    ) -> None:
        x, y = self._images(count)
        generator = seeding.generator_for(0, "rehearsal", self.device)

        def step() -> None:
            with precision.autocast(self.device):
                found = brief.inner(self.model, x, y, generator=generator)
                objective = brief.outer(self.model, x, found, y, loss=cross_entropy)
            objective.loss.backward()  # type: ignore[no-untyped-call]
            if isinstance(brief, Replayed):
                brief.advance(x, found)

        with _state_restored(defense):
            brief = defense
            if isinstance(defense, Attacking):
                brief = with_attack(defense, frugal(defense.attack))
            _tried(step, failed, place)

    def _images(self, count: int) -> tuple[Tensor, Tensor]:
        draws = seeding.generator_for(0, "images of the rehearsal")
        x = torch.rand(count, *self.info.image_shape, generator=draws)
        # From the last class on, which another model may not know.
        y = -1 - torch.arange(count, device=self.device)
        return x.to(self.device), y % self.info.num_classes


def _tried(action: Callable[[], T], failed: InputError, place: str = "") -> T:
    """The result of `action`; `failed`, with the reason at its end, if it raises anything.

    The key of an attack that `action` refuses is below the key `place`.
    """
    try:
        return action()
    except InputError as error:
        raise error.under(place) from error
    # A model, a defense or an attack of the user's own may raise anything.
    except Exception as error:
        allowed = failed.allowed + reason_of(error)
        raise InputError(failed.key, failed.value, allowed, failed.problem) from error


@contextmanager
def _restored(model: nn.Module, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with (
            modes_restored(model),
            buffers_copied(model.modules()),
            torch.random.fork_rng(devices),
            drawing_from(model, 0),
        ):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def _state_restored(defense: Defense) -> Iterator[None]:
    if not isinstance(defense, Stateful):
        yield
        return
    state = defense.state_dict()
    try:
        yield
    finally:
        defense.load_state_dict(state)


@contextmanager
def _second_derivatives(model: nn.Module) -> Iterator[list[bool]]:
    """For each backward pass through the outputs in the block, whether it is differentiated."""
    needed: list[bool] = []

    def watch(module: nn.Module, images: object, output: object) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            # Autograd enables gradients in a backward pass that is to be differentiated.
            note = lambda _: needed.append(torch.is_grad_enabled())  # noqa: E731
            output.register_hook(note)  # type: ignore[no-untyped-call]

    with model.register_forward_hook(watch):
        yield needed
