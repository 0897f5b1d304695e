"""Robust features without labels: an encoder learns to keep its own clean features."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.attacks import Attack, Loss, parts
from robusttrain.attacks.apgd import APGD
from robusttrain.attacks.friendly import FriendlyPGD
from robusttrain.attacks.model_view import QueryCounter, frozen
from robusttrain.attacks.none import refuse_none
from robusttrain.attacks.pgd import PGD
from robusttrain.attacks.transfer import Transfer
from robusttrain.defenses import Objective, each_row
from robusttrain.defenses.divergence import (
    refuse_labels,
    refuse_own_objective,
    refuse_start_at_image,
)
from robusttrain.models.features import Features, heads_of
from robusttrain.noise.control import noise_off


class WithFeatures(NamedTuple):
    """Adversarial images, and the features of the original encoder at the clean images.

    Parameters
    ----------
    x_adv
        Adversarial images (N, C, H, W).
    target
        Features (N, D).
    """

    x_adv: Tensor
    target: Tensor


class Encoder(NamedTuple):
    """What the features are of.

    Parameters
    ----------
    original
        A copy of the model as it started, in eval mode.
    heads
        The layers of its head.
    trained
        The layers of the head of the model in training.
    """

    original: nn.Module
    heads: tuple[nn.Module, ...]
    trained: tuple[nn.Module, ...]


@dataclass
class FARE:
    """min E[ max_{z in S(x)} |phi(z) - phi_0(x)|_2^2 ] (FARE, Schlarmann et al. 2024, eq. 3).

    phi are the features, which enter the head of the model, and phi_0 those of the model as it
    started, without its noise and in eval mode. The attack climbs the same distance. Neither it nor
    the objective reads labels, and the head stays as it is. One forward and one backward pass for
    the adversarial images, and a forward pass of the original model, besides the passes of the
    attack. The copy of the model is kept in memory and in the checkpoints that a run resumes from.

    Parameters
    ----------
    attack
        Any attack that climbs a loss on the model itself, does not start at x, where the distance
        has gradient 0, and does not ask whether an image is misclassified.
    encoder
        The model as it started, which `with_original` sets.
    """

    attack: Attack
    encoder: Encoder | None = field(default=None, repr=False, metadata={"section": "model"})

    def __post_init__(self) -> None:
        refuse_none(self.attack)
        refuse_labels(self.attack)
        refuse_own_objective(self.attack)
        refuse_start_at_image(self.attack)
        name, inside = type(self.attack).__name__, parts(self.attack)
        allowed = "one that searches on the model that is trained"
        elsewhere = any(isinstance(part, Transfer) for part in inside)
        ranges.require(not elsewhere, "attack", name, allowed)
        allowed = "one that ends without regard to labels (no attack.stop_early, give_up or far)"
        ranges.require(not any(map(_asks_for_success, inside)), "attack", name, allowed)

    def with_original(self, model: nn.Module, num_classes: int) -> "FARE":
        """The same defense, which keeps the features of `model` as it is now.

        Raises
        ------
        InputError
            If it has no head that can be told.
        """
        original = copy.deepcopy(model).eval()
        heads = heads_of(original, num_classes), heads_of(model, num_classes)
        return replace(self, encoder=Encoder(original, *heads))

    def state_dict(self) -> dict[str, Any]:
        """The state dict of the original model."""
        return {"original": self._encoder.original.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the original model of `state`."""
        self._encoder.original.load_state_dict(state["original"])

    def inner(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator
    ) -> WithFeatures:
        """Images whose features are farthest from the original ones at `x`, and these."""
        target = self._original_features(x)
        # Its outputs are no logits: no image counts as misclassified, and labels are left out.
        view = QueryCounter(_MeanFeatures(model, self._encoder.trained), len(x), random=True)
        x_adv = self.attack(
            view, x, torch.zeros_like(y), loss=DistanceFrom(target), generator=generator
        )
        return WithFeatures(x_adv, target)

    def outer(
        self, model: nn.Module, x: Tensor, found: WithFeatures, y: Tensor, *, loss: Loss
    ) -> Objective:
        """The squared distance from the original features; labels and `loss` are not used."""
        features = Features(model, self._encoder.trained)(found.x_adv)
        return Objective(squared_distance(each_row(found.target, features), features).mean())

    @property
    def _encoder(self) -> Encoder:
        assert self.encoder is not None, "with_original comes first"
        return self.encoder

    def _original_features(self, x: Tensor) -> Tensor:
        original = self._encoder.original.to(x.device)
        with frozen(original), noise_off(original), torch.no_grad():
            return cast(Tensor, _MeanFeatures(original, self._encoder.heads)(x))


def squared_distance(target: Tensor, features: Tensor) -> Tensor:
    """|features - target|_2^2 of each row, (N,), of features (N, D), in at least float32.

    bf16 has too few digits for the difference of features that are almost equal.
    """
    wide = torch.promote_types(features.dtype, torch.float32)
    return (features.to(wide) - target.to(wide)).square().sum(1)


class DistanceFrom:
    """A loss for attacks: the squared distance of features from given ones. Labels are ignored.

    Parameters
    ----------
    target
        Features (N, D) for the images of the batch, as constants.
    """

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def __call__(self, features: Tensor, y: Tensor) -> Tensor:
        """|features - target|_2^2 of each image, (N,)."""
        return squared_distance(self.target, features)

    def take(self, rows: Tensor | slice) -> "DistanceFrom":
        """The same loss for the images at `rows`."""
        return DistanceFrom(self.target[rows])


class _MeanFeatures(Features):
    """What an attack sees: the features of each image, (N, D), averaged over its draws of noise."""

    def forward(self, x: Tensor) -> Tensor:
        features = super().forward(x)
        return features.view(len(x), -1, features.shape[1]).mean(1)


def _asks_for_success(attack: object) -> bool:
    """Whether an attack ends, for some images, by whether they are misclassified."""
    match attack:
        case FriendlyPGD() | PGD(stop_early=True) | APGD(give_up=True):
            return True
        case APGD():
            return attack.far is not None
    return False
