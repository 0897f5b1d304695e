"""Logit pairing, which masks gradients more than it defends: a control for evaluations."""

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
    """The logits that are paired: of an image and its adversarial image, or of two clean images."""

    adversarial = "adversarial"
    clean = "clean"


@dataclass
class ALP:
    """min E[ J + weight |f(x) - f(x')|^2 / K ] for K classes (Kannan, Kurakin, Goodfellow 2018).

    With `pairing=adversarial`, x' is the adversarial image, a constant of the outer gradient, and J
    is the loss on clean and adversarial images in equal parts. With `pairing=clean`, x' is another
    image of the batch, of any class: each image of the first half is paired with one of the second.
    J is then the loss on clean images, and no attack is run. The paper adds Gaussian noise to the
    images, which is `noise=gaussian`. Engstrom, Ilyas and Athalye 2018 break the defense.

    With an attack, two forward passes and one backward pass through both, besides the passes of the
    attack. Without one, a single forward and a single backward pass.

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

    def unused(self) -> dict[str, str]:
        """The attack, with `pairing=clean`."""
        return {"attack": "pairing"} if self.pairing is Pairing.clean else {}

    def inner(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator
    ) -> Tensor:
        """Adversarial images, or the clean ones with `pairing=clean`."""
        if self.pairing is Pairing.clean:
            return x
        return self.attack(model, x, y, generator=generator)

    def outer(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, loss: Loss
    ) -> Objective:
        """The loss plus the weighted distance of paired logits."""
        if self.pairing is Pairing.clean:
            return self._clean(model, x, y, loss)
        return self._adversarial(model, x, x_adv, y, loss)

    def _clean(self, model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> Objective:
        clean = model(x)
        # An image has a row for each draw of noise.
        half = len(x) // 2 * (len(clean) // len(x))
        # A sum, since the mean over the pairs of a single image would be NaN.
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
