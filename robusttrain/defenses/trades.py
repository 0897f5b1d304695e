"""TRADES: a trade-off between clean accuracy and the divergence of outputs nearby."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.attacks import Attack, Loss, traits_of
from robusttrain.attacks.model_view import frozen, outputs_as_in
from robusttrain.attacks.none import refuse_none
from robusttrain.defenses import Objective, WithCleanPass
from robusttrain.defenses.divergence import (
    DivergenceFrom,
    divergence,
    log_probabilities,
    mean_log_probabilities,
    refuse_labels,
    refuse_own_objective,
    refuse_start_at_image,
)


@dataclass
class TRADES:
    """min E[ L(f(x), y) + beta max_{z in S(x)} KL(f(x) || f(z)) ] (Zhang et al. 2019, Alg. 1).

    The attack climbs the divergence. The gradient of the objective goes through both f(x) and f(z).
    One forward and one backward pass for each of the clean and the adversarial images, besides the
    passes of the attack. The attack reuses the outputs of the clean pass. If BatchNorm or dropout
    gives other outputs in the mode of the attack (by default eval, as in the paper), the attack
    needs one more forward pass.

    Parameters
    ----------
    attack
        Any attack that does not start at x, where the divergence has gradient 0.
    beta
        Weight of the divergence, 0 or more.
    """

    attack: Attack
    beta: float = 6.0

    def __post_init__(self) -> None:
        ranges.at_least(0, beta=self.beta)
        refuse_none(self.attack)
        refuse_labels(self.attack)
        refuse_own_objective(self.attack)
        refuse_start_at_image(self.attack)

    def unused(self) -> dict[str, str]:
        """The attack, if its images have no weight."""
        return {"attack": "beta"} if self.beta == 0 else {}

    def inner(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator
    ) -> WithCleanPass:
        """Images whose outputs differ most from those at `x`, and the clean logits."""
        clean = model(x)
        reference = mean_log_probabilities(self._reference_logits(model, x, clean), len(x))
        x_adv = self.attack(model, x, y, loss=DivergenceFrom(reference), generator=generator)
        return WithCleanPass(x_adv, clean)

    def outer(
        self, model: nn.Module, x: Tensor, found: WithCleanPass, y: Tensor, *, loss: Loss
    ) -> Objective:
        """The clean loss plus the weighted divergence."""
        clean = model(x) if found.clean is None else found.clean
        adversarial = model(found.x_adv)
        robust = divergence(log_probabilities(clean), adversarial)
        objective = loss(clean, y).mean() + self.beta * robust.mean()
        return Objective(objective, clean=clean, adversarial=adversarial)

    def _reference_logits(self, model: nn.Module, x: Tensor, clean: Tensor) -> Tensor:
        """The logits at `x` in the mode in which the attack runs the model."""
        mode = traits_of(self.attack).mode
        if outputs_as_in(model, mode):
            return clean.detach()
        with frozen(model, mode), torch.no_grad():
            return cast(Tensor, model(x))
