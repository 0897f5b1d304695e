"""Training on a point between the logits of an adversarial image and their bounds."""

from dataclasses import dataclass

from torch import Tensor

from robusttrain.attacks import Loss
from robusttrain.attacks.none import refuse_none
from robusttrain.defenses import each_row
from robusttrain.defenses.bounded import WeightedBounds


@dataclass
class CCIBP(WeightedBounds):
    """min E[ L((1 - weight) z(adv(x)) + weight m(x), y) ] (De Palma et al. 2024, CC-IBP).

    z_k = f_k - f_y are differences of logits, and m(x) their upper bounds in S(x), as in `IBP`; the
    paper's alpha is `weight`. With weight 1 it is `IBP` with weight 1, and with weight 0
    adversarial training on the attack alone. It costs as much as `MTLIBP`.

    Parameters
    ----------
    attack
        Any attack but none.
    norm, eps, eps_margin, statistics, regularisation
        As for `IBP`.
    weight
        Weight of the bounds, from 0 to 1.
    weight_warmup
        Whether the warm-up of `training.curriculum` increases the weight from 0 on, too. The paper
        has a constant weight.
    """

    weight_warmup: bool = False

    def check_attack(self) -> None:
        """Raise `InputError` if there is no attack, since that is another method."""
        refuse_none(self.attack)

    def combined(self, logits: Tensor, worst: Tensor, y: Tensor, loss: Loss) -> Tensor:
        """The loss at the convex combination of differences of logits."""
        differences = logits - logits.gather(1, each_row(y, logits)[:, None])
        return loss((1 - self.weight) * differences + self.weight * worst, y)
