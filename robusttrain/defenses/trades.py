"""TRADES: accuracy on clean images against the divergence of outputs nearby."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.attacks import Attack, Loss, traits_of
from robusttrain.attacks.model_view import held_still, outputs_as_in
from robusttrain.defenses import Objective
from robusttrain.defenses.divergence import (
    DivergenceFrom,
    divergence,
    log_probabilities,
    mean_log_probabilities,
    refuse_labels,
    refuse_start_at_image,
)


@dataclass
class TRADES:
    """min E[ L(f(x), y) + beta max_{z in S(x)} KL(f(x) || f(z)) ] (Zhang et al. 2019, Alg. 1).

    The attack climbs the divergence, and the gradient of the objective goes through both of its
    sides: one forward and one backward pass for each of the clean and the adversarial images,
    beside those of the attack, which moves away from the output that the clean pass gave anyway.
    Where BatchNorm or dropout has another one in the mode of the attack (by default eval, as in the
    paper), it moves away from that, for one forward pass more.

    Parameters
    ----------
    attack
        Any attack that starts away from x, where the divergence has no slope.
    beta
        Weight of the divergence, 0 or more.
    """

    attack: Attack
    beta: float = 6.0

    def __post_init__(self) -> None:
        ranges.at_least(0, beta=self.beta)
        refuse_labels(self.attack)
        refuse_start_at_image(self.attack)

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, loss: Loss, generator: torch.Generator
    ) -> Iterator[Objective]:
        """The clean loss and the weighted divergence."""
        clean = model(x)
        away = DivergenceFrom(mean_log_probabilities(self._attacked(model, x, clean), len(x)))
        x_adv = self.attack(model, x, y, loss=away, generator=generator)
        objective = self._objective(clean, model(x_adv), y, loss)
        # The clean pass that the attack moved away from is that of the first objective too.
        yield objective._replace(again=lambda: self._objective(model(x), model(x_adv), y, loss))

    def _attacked(self, model: nn.Module, x: Tensor, clean: Tensor) -> Tensor:
        """The outputs at `x` in the mode that the attack has the model in."""
        mode = traits_of(self.attack).mode
        if outputs_as_in(model, mode):
            return clean.detach()
        with held_still(model, mode), torch.no_grad():
            return cast(Tensor, model(x))

    def _objective(self, clean: Tensor, adversarial: Tensor, y: Tensor, loss: Loss) -> Objective:
        robust = divergence(log_probabilities(clean), adversarial)
        objective = loss(clean, y).mean() + self.beta * robust.mean()
        return Objective(objective, clean=clean, adversarial=adversarial)
