"""Training on the geometric mean of the loss at an adversarial image and that at the bounds."""

from dataclasses import dataclass

from torch import Tensor

from robusttrain.attacks import Loss
from robusttrain.attacks.none import refuse_none
from robusttrain.defenses.bounded import WeightedBounds

# A power of a loss below it would have an infinite slope.
SMALLEST_LOSS = 1e-12


@dataclass
class ExpIBP(WeightedBounds):
    """min E[ L(f(adv(x)), y)^(1 - weight) L(m(x), y)^weight ] (De Palma et al. 2024, Exp-IBP).

    m(x) are the worst logits that bounds leave possible in S(x), as in `IBP`; the paper's alpha is
    `weight`. With weight 1 it is `IBP` with weight 1, and with weight 0 adversarial training on the
    attack alone. It costs as much as `MTLIBP`.

    Parameters
    ----------
    attack
        Any attack but none.
    norm, eps, eps_margin, statistics, regularisation
        As for `IBP`.
    weight
        Exponent of the loss at the bounds, from 0 to 1.
    weight_warmup
        Whether the warm-up of `training.curriculum` increases the weight from 0 on, too. The paper
        has a constant weight.
    """

    weight_warmup: bool = False

    def check_attack(self) -> None:
        """Raise `InputError` if there is no attack, since that is another method."""
        refuse_none(self.attack)

    def combined(self, logits: Tensor, worst: Tensor, y: Tensor, loss: Loss) -> Tensor:
        """The weighted geometric mean of the two losses."""
        found, bound = (loss(each, y).clamp_min(SMALLEST_LOSS) for each in (logits, worst))
        return found ** (1 - self.weight) * bound**self.weight
