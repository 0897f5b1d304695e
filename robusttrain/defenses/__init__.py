"""Defenses: the outer objective, that is, which loss is minimised at which points.

A defense has two methods: `inner` finds the points, and `outer` computes the loss there. A step of
training is

    found = defense.inner(model, x, y, generator=generator)
    objective = defense.outer(model, x, found, y, loss=loss)
    optimizer.zero_grad()
    objective.loss.backward()
    optimizer.step()

The model is in train mode. Adversarial weight perturbation calls `outer` a second time, at other
weights and with the same result of `inner`. A class that derives from `Defense` inherits an `inner`
that returns the clean images.

Some defenses need more, and each need has a protocol: `Replayed` to train several times on a batch,
`Stateful` to keep something from batch to batch, `Scheduled` to be changed by the curriculum,
`WithModels` to train with other models, `Unsupervised` to train features without labels,
`Selective` to refuse models. A defense states its threat model as attacks do, by `Bounded`. The
threat model of an attack in its field `attack` counts too.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from robusttrain.attacks import Loss


class Objective(NamedTuple):
    """The loss to minimise, and the logits that were computed on the way.

    Parameters
    ----------
    loss
        A scalar with a graph to the parameters. It is a mean over the images: a batch that does not
        fit into memory is split, and the losses of its parts are weighted by their sizes.
    clean, adversarial
        Logits (N, K) at the clean and at the adversarial images, where they were computed. The
        progress display and `train.csv` take their accuracies from them.
    """

    loss: Tensor
    clean: Tensor | None = None
    adversarial: Tensor | None = None


@runtime_checkable
class Defense(Protocol):
    """The inner maximiser and the outer objective, which every defense has.

    Images `x` (N, C, H, W) are in [0, 1], labels `y` (N,) are classes.
    """

    def inner(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Any:
        """Adversarial images, or whatever else `outer` needs. The default returns the clean images.

        All random numbers are drawn from `generator`.
        """
        return x

    @abstractmethod
    def outer(self, model: nn.Module, x: Tensor, found: Any, y: Tensor, *, loss: Loss) -> Objective:
        """The loss at the current weights of `model`; `found` is the result of `inner`."""


class WithCleanPass(NamedTuple):
    """Adversarial images, with the logits at the clean images that `inner` computed on the way.

    Parameters
    ----------
    x_adv
        Adversarial images (N, C, H, W).
    clean
        The logits at the clean images. Their graph can be used by one call of `outer`. None for any
        further call, which has to compute the logits again.
    """

    x_adv: Tensor
    clean: Tensor | None


def reusable(found: Any) -> Any:
    """The result of `inner` without the graph that a call of `outer` has used up."""
    return found._replace(clean=None) if isinstance(found, WithCleanPass) else found


@runtime_checkable
class Replayed(Protocol):
    """A defense that trains several times on each batch, with an optimiser step for each replay.

    For each batch `inner` is called once. Each of the `replays` calls `outer`, takes a step, and
    then calls `advance`.
    """

    replays: int

    def advance(self, x: Tensor, found: Any) -> Any:
        """`found` for the next replay. The tensors of the present one may have gradients by now."""


@runtime_checkable
class Stateful(Protocol):
    """A defense that keeps a state from batch to batch; checkpoints hold it.

    Its batches are never split, even if they do not fit into memory.
    """

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that the next batch depends on."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, whose tensors may be on another device."""


@runtime_checkable
class WithModels(Protocol):
    """A defense that trains with other models, which its configuration names by their runs."""

    def with_models(self, load: Callable[[str, str], nn.Module]) -> Defense:
        """The same defense with its models, each of them `load(key, run directory or checkpoint)`.

        It is called once, before training. An evaluation does not need the models.
        """


@runtime_checkable
class Unsupervised(Protocol):
    """A defense that reads no labels, and trains what comes before the head.

    The head is frozen, and PGD-10 does not search for catastrophic overfitting. It starts from a
    trained model.
    """

    def with_original(self, model: nn.Module, num_classes: int) -> Defense:
        """The same defense, which knows `model` as it is now. It is called once, before training.

        If training is resumed, `model` is new, and a `Stateful` defense gets the state of the
        original one.

        Raises
        ------
        InputError
            If `model` has no head that can be told.
        """


@runtime_checkable
class Selective(Protocol):
    """A defense that cannot train every model."""

    def refuse_unfit(self, model: nn.Module, image_shape: tuple[int, int, int]) -> None:
        """Raise `InputError` if it cannot train `model`; called before data is loaded."""


@runtime_checkable
class Scheduled(Protocol):
    """A defense with more than a radius for `training.curriculum` to warm up.

    The radii need nothing of this kind: the curriculum scales those of the defense
    (`robusttrain.attacks.Bounded`) and of its attack by itself.
    """

    def scheduled(self, share: float) -> Defense:
        """A copy with everything scheduled, except the radii, times `share` in [0, 1]."""


def each_row(values: Tensor, logits: Tensor) -> Tensor:
    """Repeat the `values` (N, ...) of the images for each row of `logits`.

    With `noise.draws` an image has several rows, one for each draw, which follow one another.
    """
    return values.repeat_interleave(len(logits) // len(values), 0)


# The modules of the defenses, which import this one, and are imported on first use.
_METHODS = {
    "ALP": "alp",
    "AVG": "avg",
    "AlphaMix": "alpha_mix",
    "CCIBP": "cc_ibp",
    "CROWNIBP": "crown_ibp",
    "Distill": "distill",
    "EAT": "eat",
    "ExpIBP": "exp_ibp",
    "FARE": "fare",
    "Free": "free",
    "GradAlign": "grad_align",
    "IBP": "ibp",
    "LSA": "lsa",
    "MART": "mart",
    "MTLIBP": "ibp",
    "NFGSM": "n_fgsm",
    "RAMP": "ramp",
    "RT": "rt",
    "SABR": "sabr",
    "Standard": "standard",
    "TRADES": "trades",
    "WorstCase": "worst_case",
}

if TYPE_CHECKING:
    from robusttrain.defenses.alp import ALP
    from robusttrain.defenses.alpha_mix import AlphaMix
    from robusttrain.defenses.avg import AVG
    from robusttrain.defenses.cc_ibp import CCIBP
    from robusttrain.defenses.crown_ibp import CROWNIBP
    from robusttrain.defenses.distill import Distill
    from robusttrain.defenses.eat import EAT
    from robusttrain.defenses.exp_ibp import ExpIBP
    from robusttrain.defenses.fare import FARE
    from robusttrain.defenses.free import Free
    from robusttrain.defenses.grad_align import GradAlign
    from robusttrain.defenses.ibp import IBP, MTLIBP
    from robusttrain.defenses.lsa import LSA
    from robusttrain.defenses.mart import MART
    from robusttrain.defenses.n_fgsm import NFGSM
    from robusttrain.defenses.ramp import RAMP
    from robusttrain.defenses.rt import RT
    from robusttrain.defenses.sabr import SABR
    from robusttrain.defenses.standard import Standard
    from robusttrain.defenses.trades import TRADES
    from robusttrain.defenses.worst_case import WorstCase
else:

    def __getattr__(name: str) -> object:
        """Import one of the defenses on first use."""
        if name not in _METHODS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_METHODS[name]}"), name)


__all__ = [
    "ALP",
    "AVG",
    "CCIBP",
    "CROWNIBP",
    "EAT",
    "FARE",
    "IBP",
    "LSA",
    "MART",
    "MTLIBP",
    "NFGSM",
    "RAMP",
    "RT",
    "SABR",
    "TRADES",
    "AlphaMix",
    "Defense",
    "Distill",
    "ExpIBP",
    "Free",
    "GradAlign",
    "Objective",
    "Replayed",
    "Scheduled",
    "Selective",
    "Standard",
    "Stateful",
    "Unsupervised",
    "WithCleanPass",
    "WithModels",
    "WorstCase",
    "each_row",
    "reusable",
]  # fmt: skip
