"""The worst point of several balls, each of which is searched by itself."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from robusttrain import seeding
from robusttrain.attacks import Loss, Traits, frugal, traits_of
from robusttrain.attacks.attack_loss import attack_loss, cross_entropy
from robusttrain.attacks.model_view import frozen
from robusttrain.attacks.search_state import highest
from robusttrain.attacks.several_norms import AttackInSeveralNorms, searches


@dataclass
class MaxOfNorms(AttackInSeveralNorms):
    """argmax_p L(f(z_p), y), where z_p is what `attack` finds in the ball of norm p.

    The inner maximum over a union of balls (Tramer and Boneh 2019, section 2, "max" strategy;
    MAX in Maini et al. 2020). It costs the attack once for each norm, and then a forward pass for
    each, which decides.
    """

    @property
    def traits(self) -> Traits:
        """Those of the attack."""
        return traits_of(self.attack)

    def frugal(self) -> Self:
        """The same search by a cheap form of its attack."""
        return replace(self, attack=frugal(self.attack))

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        loss: Loss = cross_entropy,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Adversarial images for `x` (N, C, H, W) in [0, 1] with labels `y` (N,)."""
        generator = generator or seeding.fresh(x.device)
        each = searches(self.attack, self.threats)
        found = [search(model, x, y, loss=loss, generator=generator) for search in each]
        with frozen(model, self.traits.mode):
            surrogate = attack_loss(model, x, y, label=self.traits.label, loss=loss)
            return highest(found, [surrogate.score(x_adv)[0] for x_adv in found])
