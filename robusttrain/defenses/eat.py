"""Extreme norms adversarial training: each batch is attacked in one of two norms."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robusttrain.attacks import Loss, under
from robusttrain.attacks.model_view import predictions
from robusttrain.attacks.several_norms import AttackInSeveralNorms
from robusttrain.defenses import Objective, each_row

# How much of the running error the next batch leaves.
KEPT = 0.9


@dataclass
class EAT(AttackInSeveralNorms):
    """min E[ max_{z in S_p(x)} L(f(z), y) ], with p drawn for each batch (Croce and Hein 2022).

    E-AT only trains on the extremes, the innermost and the outermost ball of the same radius (l1
    and linf), whose convex hull contains a large part of the others. The norm of a batch is drawn
    with a probability proportional to the running error of training under it, so that training
    keeps to the one that it is worse in. The running error is an exponential average with the
    factor 0.9; both start at 1. It is kept in checkpoints. A batch costs what `WorstCase` costs.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._errors = torch.ones(2)
        # Which extreme the present batch is attacked in, until its error is known.
        self._drawn: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """The running errors (2,) under the extremes."""
        return {"errors": self._errors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._errors = state["errors"]

    def inner(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator
    ) -> Tensor:
        """Adversarial images in one of the norms."""
        self._errors = self._errors.to(x.device)
        # No norm may be lost for good once it has no errors.
        odds = self._errors.clamp_min(torch.finfo(self._errors.dtype).tiny)
        self._drawn = int(torch.multinomial(odds, 1, generator=generator))
        search = under(self.attack, self.extremes[self._drawn])
        return search(model, x, y, generator=generator)

    def outer(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, loss: Loss
    ) -> Objective:
        """The loss at the adversarial images; the first call counts their errors."""
        logits = model(x_adv)
        if self._drawn is not None:
            wrong = predictions(logits.detach()) != each_row(y, logits)
            errors, drawn = self._errors.clone(), self._drawn
            errors[drawn] = KEPT * errors[drawn] + (1 - KEPT) * wrong.float().mean()
            self._errors, self._drawn = errors, None
        return Objective(loss(logits, y).mean(), adversarial=logits)
