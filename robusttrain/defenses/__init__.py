"""Defenses: the outer objective, that is, which loss is descended at which points.

A defense says where to look, `inner`, and what to descend there, `outer`. A step of training is

    found = defense.inner(model, x, y, generator=generator)
    objective = defense.outer(model, x, found, y, loss=loss)
    optimizer.zero_grad()
    objective.loss.backward()
    optimizer.step()

The model comes in train mode. Adversarial weight perturbation asks for `outer` a second time, at
other weights and with what `inner` has found. A class that derives from `Defense` need not write an
`inner` of its own.

What only some defenses have to say, they say by protocols of their own: `Replayed` to descend a
batch several times, `Stateful` to keep something from batch to batch, `Growing` to be scheduled by
the curriculum, `WithModels` to train with other models, `Selective` to refuse models. Their threat
model they say as attacks do, by `Bounded`; that of an attack in their field `attack` goes with it.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from robusttrain.attacks import Loss


class Objective(NamedTuple):
    """What is descended, and the logits that its computation gave anyway.

    Parameters
    ----------
    loss
        A scalar with a graph to the parameters, a mean over the images: a batch that does not fit
        into memory is given in parts, and their losses are weighted by their shares of it.
    clean, adversarial
        Logits (N, K) at the clean and at the adversarial images, where they were computed; the
        progress display and `train.csv` take their accuracies from them.
    """

    loss: Tensor
    clean: Tensor | None = None
    adversarial: Tensor | None = None


@runtime_checkable
class Defense(Protocol):
    """What every defense has: the inner maximiser and the outer objective.

    Images `x` (N, C, H, W) are in [0, 1], labels `y` (N,) are classes.
    """

    def inner(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Any:
        """Where `outer` looks: adversarial images, or whatever it needs; the clean images here.

        All random numbers are drawn from `generator`.
        """
        return x

    @abstractmethod
    def outer(self, model: nn.Module, x: Tensor, found: Any, y: Tensor, *, loss: Loss) -> Objective:
        """What is descended at the weights that `model` has now, with what `inner` has found."""


class WithCleanPass(NamedTuple):
    """What `inner` has found, with the clean pass that it made on the way.

    Parameters
    ----------
    x_adv
        Adversarial images (N, C, H, W).
    clean
        The logits at the clean images with their graph, which serves one `outer`. None for a
        further one, which has to compute them itself.
    """

    x_adv: Tensor
    clean: Tensor | None


def reusable(found: Any) -> Any:
    """What `inner` has found, without the pass that one `outer` has used up."""
    return found._replace(clean=None) if isinstance(found, WithCleanPass) else found


@runtime_checkable
class Replayed(Protocol):
    """A defense that descends each batch several times, with a step of the optimiser for each.

    `inner` is asked once a batch, `outer` in each of the `replays`, and `advance` behind each step.
    """

    replays: int

    def advance(self, x: Tensor, found: Any) -> Any:
        """What the next replay takes for `found`, whose tensors may have gradients by now."""


@runtime_checkable
class Stateful(Protocol):
    """A defense that goes on from what it has kept of earlier batches; checkpoints hold it.

    Its batches are never computed in parts, also where they do not fit into memory.
    """

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, on which the next batch depends."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, whose tensors may be on another device."""


@runtime_checkable
class WithModels(Protocol):
    """A defense that trains with other models, which its configuration names by their runs."""

    def with_models(self, load: Callable[[str, str], nn.Module]) -> Defense:
        """The same defense with its models, each of them `load(key, run directory or checkpoint)`.

        It is asked for once, before training; who only evaluates needs none of them.
        """


@runtime_checkable
class Selective(Protocol):
    """A defense that cannot train every model."""

    def refuse_unfit(self, model: nn.Module, image_shape: tuple[int, int, int]) -> None:
        """Raise `InputError` if `model` is none of them; asked for before data is loaded."""


@runtime_checkable
class Growing(Protocol):
    """A defense with more than radii that starts small where `training.curriculum` warms up.

    Radii grow by themselves, its own (`robusttrain.attacks.Bounded`) and those of its attack.
    """

    def grown(self, share: float) -> Defense:
        """A copy with `share`, in [0, 1], of everything but the radii that grows."""


def each_row(values: Tensor, logits: Tensor) -> Tensor:
    """`values` (N, ...) of the images for each row of `logits`, of which an image may have several.

    With `noise.draws` the rows of an image, one for each draw, follow one another.
    """
    return values.repeat_interleave(len(logits) // len(values), 0)
