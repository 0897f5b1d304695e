"""Defenses: the outer objective, that is, which loss is descended at which points.

A defense is called for each batch and yields the objectives to descend, one optimiser step each:

    for objective in defense(model, x, y, loss=loss, generator=generator):
        optimizer.zero_grad()
        objective.loss.backward()
        optimizer.step()

The model comes in train mode. Most defenses yield once; one that replays a batch yields each time.
What a defense keeps from batch to batch, the saved models that it trains with, which models it
cannot train, and what grows with its radii, it says by four protocols more, `Stateful`,
`WithModels`, `Selective` and `Growing`. Its threat model it says as attacks do, by `Bounded`; that
of an attack in its field `attack` goes with it.

An objective that says how it is computed `again` can also be descended at other weights than the
present ones, as adversarial weight perturbation does; `repeatable` makes one.
"""

from collections.abc import Callable, Iterator, Mapping
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
    again
        Computes the objective anew, for the same images, at the weights that the model then has.
    """

    loss: Tensor
    clean: Tensor | None = None
    adversarial: Tensor | None = None
    again: "Callable[[], Objective] | None" = None


def repeatable(compute: Callable[[], Objective]) -> Objective:
    """What `compute` gives now, with `compute` itself to have it `again`."""
    return compute()._replace(again=compute)


class Defense(Protocol):
    """What every defense can be called as."""

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, loss: Loss, generator: torch.Generator
    ) -> Iterator[Objective]:
        """The objectives for images `x` (N, C, H, W) in [0, 1] and labels `y` (N,)."""


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
