"""Adversarial distillation: a student learns to match the outputs of a robust teacher."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.attacks import Attack, Loss
from robusttrain.attacks.model_view import frozen
from robusttrain.attacks.none import refuse_none
from robusttrain.defenses import Objective, each_row
from robusttrain.defenses.divergence import (
    DivergenceFrom,
    divergence,
    log_probabilities,
    refuse_labels,
    refuse_own_objective,
)
from robusttrain.noise.control import drawing_from
from robusttrain.noise.layer import noise_layers


class WithTarget(NamedTuple):
    """Adversarial images, and the teacher's outputs on the clean images.

    Parameters
    ----------
    x_adv
        Adversarial images (N, C, H, W).
    target
        Log-probabilities (N, K) of the teacher.
    """

    x_adv: Tensor
    target: Tensor


@dataclass
class Distill:
    """min E[ alpha KL(t(x) || f(z)) + (1 - alpha) KL(t(x) || f(x)) ] (RSLAD, Zi et al. 2021).

    The attack finds z by climbing the first divergence. The teacher t only gets clean images; its
    outputs replace the labels. One forward and one backward pass for each of the clean and the
    adversarial images, and a forward pass of the teacher, besides the passes of the attack.

    Parameters
    ----------
    attack
        Any attack but none.
    teacher
        A model of the same images and classes, or the run directory or checkpoint that it is
        loaded from before training.
    alpha
        Weight of the adversarial images, from 0 to 1; 5/6 in the paper.
    """

    attack: Attack
    teacher: nn.Module | str
    alpha: float = 5 / 6

    def __post_init__(self) -> None:
        ranges.within(0, 1, alpha=self.alpha)
        refuse_none(self.attack)
        refuse_labels(self.attack)
        refuse_own_objective(self.attack)

    def unused(self) -> dict[str, str]:
        """The attack, if its images have no weight."""
        return {"attack": "alpha"} if self.alpha == 0 else {}

    def with_models(self, load: Callable[[str, str], nn.Module]) -> "Distill":
        """A copy with its teacher, which `load(key, run)` loads unless it is a module already."""
        if isinstance(self.teacher, nn.Module):
            return self
        return replace(self, teacher=load("teacher", self.teacher))

    def inner(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator
    ) -> WithTarget:
        """Images whose outputs differ most from those of the teacher on the clean images."""
        target = self._teacher_outputs(x, generator)
        x_adv = self.attack(model, x, y, loss=DivergenceFrom(target), generator=generator)
        return WithTarget(x_adv, target)

    def outer(
        self, model: nn.Module, x: Tensor, found: WithTarget, y: Tensor, *, loss: Loss
    ) -> Objective:
        """The divergences from the teacher; the labels and `loss` are not used."""
        clean, adversarial = model(x), model(found.x_adv)
        rows = each_row(found.target, clean)
        robust, natural = (divergence(rows, logits) for logits in (adversarial, clean))
        mixture = self.alpha * robust + (1 - self.alpha) * natural
        return Objective(mixture.mean(), clean=clean, adversarial=adversarial)

    def _teacher_outputs(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Log-probabilities (N, K) of the teacher."""
        assert isinstance(self.teacher, nn.Module), "with_models loads it"
        teacher, seed = self.teacher.to(x.device), 0
        if noise_layers(teacher):
            # Drawn from the training's stream, since no checkpoint has the teacher's own streams.
            high = torch.iinfo(torch.int64).max
            draw = torch.randint(high, (1,), generator=generator, device=generator.device)
            seed = int(draw)
        with frozen(teacher), drawing_from(teacher, seed), torch.no_grad():
            return log_probabilities(teacher(x))
