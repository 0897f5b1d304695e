"""PGD that goes no further than it takes to fool (friendly adversarial training)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from robusttrain import ranges
from robusttrain.attacks.base import Surrogate
from robusttrain.attacks.pgd import PGD
from robusttrain.attacks.search_state import Rows, standing

# What PGD can do beyond one search that returns its last iterate.
SCORED = {"restarts": 1, "keep_best": False, "stop_early": False, "targets": None}


@dataclass
class FriendlyPGD(PGD):
    """PGD whose search for an image ends `tau` steps after it was first fooled.

    Zhang et al. 2020 ("Attacks which do not kill training make adversarial learning stronger",
    Algorithm 1): training on the least adversarial of the points that fool costs less accuracy on
    clean images. An iterate that fools uses up one of the `tau` further steps; without any left,
    the image stays where it is. An image that is never fooled ends at the last iterate of PGD. At
    most `steps` forward and `steps` backward passes, in which only images take part that go on.

    Parameters
    ----------
    tau
        Further steps of an image that fools the model, 0 or more; from `steps` on this is PGD.
    """

    tau: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.at_least(0, tau=self.tau)
        for key, value in SCORED.items():
            given = getattr(self, key)
            ranges.require(given == value, key, given, f"{value} where searches are friendly")

    def search(self, surrogate: Surrogate, x: Tensor, generator: torch.Generator) -> Tensor:
        """Where the search for each image ended."""
        x_adv = self._start(x, generator).clone()
        (climbed,) = self.surrogates(surrogate, x)
        spare = torch.full((len(x),), self.tau, device=x.device)
        walk = _Walk(torch.arange(len(x), device=x.device), climbed, x, spare)
        for _ in range(self.steps):
            here = x_adv[walk.rows]
            seen = walk.surrogate.evaluate(here)
            fooled = walk.surrogate.succeeded(seen.logits)
            on = standing(fooled & (walk.spare == 0))
            if len(on) == 0:
                break
            walk.spare = walk.spare - fooled.long()
            walk, here = walk.take(on), here[on]
            step = self._step * self.ball.ascent(seen.gradient[on], here)
            x_adv[walk.rows] = self.ball.project(here + step, walk.x)
        return x_adv


@dataclass
class _Walk(Rows):
    """The images that go on, by their positions `rows`, with their `spare` further steps."""

    rows: Tensor
    surrogate: Surrogate
    x: Tensor
    spare: Tensor
