"""Logit pairing, which hides gradients more than it defends: a control for evaluations."""

from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.attacks import Attack, Loss
from robusttrain.attacks.none import NoAttack, refuse_none
from robusttrain.defenses import Objective


class Pairing(StrEnum):
    """Whose logits are pulled together: an image's and its adversarial one's, or two images'."""

    adversarial = "adversarial"
    clean = "clean"


@dataclass
class ALP:
    """min E[ J + weight |f(x) - f(x')|^2 / K ] for K classes (Kannan, Kurakin, Goodfellow 2018).

    With `pairing=adversarial` x' is the adversarial image, a constant of the outer
    gradient, and J the loss on clean and adversarial images in equal parts. With `pairing=clean`
    x' is another image of the batch, of any class: each of the first half is paired
    with one of the second, J is the loss on clean images, and no attack is run; the paper adds
    Gaussian noise to them, which is `noise=gaussian`. Engstrom, Ilyas and Athalye 2018 break it.

    Two forward passes and one backward pass through both beside those of the attack, or a single
    pass each way.

    Parameters
    ----------
    attack
        Any attack but none, for `pairing=adversarial`; none with the other pairing.
    weight
        Weight of the mean squared difference of paired logits, 0 or more.
    pairing
        Which logits are paired.
    """

    attack: Attack
    weight: float = 0.5
    pairing: Pairing = Pairing.adversarial

    def __post_init__(self) -> None:
        ranges.at_least(0, weight=self.weight)
        ranges.one_of(list(Pairing), pairing=self.pairing)
        self.pairing = Pairing(self.pairing)
        if self.pairing is Pairing.clean:
            self.attack = NoAttack()
        else:
            refuse_none(self.attack)

    def inner(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator
    ) -> Tensor:
        """Adversarial images, where their logits are paired."""
        if self.pairing is Pairing.clean:
            return x
        return self.attack(model, x, y, generator=generator)

    def outer(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, loss: Loss
    ) -> Objective:
        """The loss, and the weighted distance of paired logits."""
        if self.pairing is Pairing.clean:
            return self._clean(model, x, y, loss)
        return self._adversarial(model, x, x_adv, y, loss)

    def _clean(self, model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> Objective:
        clean = model(x)
        # As many rows for each image as it has draws of noise.
        half = len(x) // 2 * (len(clean) // len(x))
        # A sum, since a single image has no pair to take a mean of.
        apart = F.mse_loss(clean[:half], clean[half : 2 * half], reduction="sum")
        pull = apart / max(1, clean[:half].numel())
        return Objective(loss(clean, y).mean() + self.weight * pull, clean=clean)

    def _adversarial(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, loss: Loss
    ) -> Objective:
        clean, adversarial = model(x), model(x_adv)
        mixture = (loss(clean, y) + loss(adversarial, y)).mean() / 2
        pull = F.mse_loss(adversarial, clean)
        return Objective(mixture + self.weight * pull, clean=clean, adversarial=adversarial)
