"""MART: adversarial training that weights misclassified images more."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.attacks import Attack, Loss
from robusttrain.attacks.none import refuse_none
from robusttrain.defenses import Objective, each_row
from robusttrain.defenses.divergence import divergence, log_probabilities

# Slightly above 1, so that the logarithm is finite if another class has probability 1.
ONE = 1.0001


@dataclass
class MART:
    """min E[ BCE(f(z), y) + beta KL(f(x) || f(z)) (1 - f(x)_y) ] (Wang et al. 2020, Alg. 1).

    z is the adversarial image, a constant of the outer gradient, f(x) are probabilities, and the
    boosted cross-entropy is BCE(f(z), y) = L(f(z), y) - log(1.0001 - max_{k != y} f(z)_k). One
    forward and one backward pass for each of the clean and the adversarial images, besides the
    passes of the attack.

    Parameters
    ----------
    attack
        Any attack but none.
    beta
        Weight of the divergence, 0 or more.
    """

    attack: Attack
    beta: float = 6.0

    def __post_init__(self) -> None:
        ranges.at_least(0, beta=self.beta)
        refuse_none(self.attack)

    def inner(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator
    ) -> Tensor:
        """Adversarial images."""
        return self.attack(model, x, y, generator=generator)

    def outer(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, loss: Loss
    ) -> Objective:
        """The boosted cross-entropy plus the weighted divergence."""
        clean, adversarial = model(x), model(x_adv)
        own = each_row(y, clean)[:, None]
        rival = log_probabilities(adversarial).exp().scatter(1, own, 0).amax(1)
        boosted = loss(adversarial, y).mean() - (ONE - rival).log().mean()
        target = log_probabilities(clean)
        missing = 1 - target.gather(1, own).squeeze(1).exp()
        robust = (divergence(target, adversarial) * missing).mean()
        return Objective(boosted + self.beta * robust, clean=clean, adversarial=adversarial)
