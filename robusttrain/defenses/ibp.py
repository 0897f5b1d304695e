"""Training on bounds that no attack can exceed, instead of on what one attack finds."""

from dataclasses import dataclass

from torch import Tensor

from robusttrain import ranges
from robusttrain.attacks import Loss
from robusttrain.attacks.none import is_none, refuse_none
from robusttrain.defenses.bounded import WeightedBounds


@dataclass
class IBP(WeightedBounds):
    """min E[ (1 - weight) L(f(x), y) + weight L(m(x), y) ] (Gowal et al. 2018).

    Their kappa is 1 - weight. m(x) are the worst logits that interval bound propagation leaves
    possible in S(x): no point of S(x) has a larger loss, up to rounding. A forward and a backward
    pass of intervals, which cost about two of images each, and one forward and, unless the weight
    is 1, one backward pass for the images.

    The bounds of an untrained network are so wide that training ends at the uniform output, unless
    the radius grows from 0 on, as in the paper: `training.curriculum.eps_warmup` with
    `training.curriculum.per_batch`.

    Parameters
    ----------
    attack
        None: with an attack it is `MTLIBP`.
    norm
        Only linf: an interval is a box, so it would only enclose the balls of other norms.
    eps, eps_margin
        Bounds are those of radius `eps + eps_margin`, each in pixel units, 0 or more. Gowal
        et al. train at 0.2 and 0.4 to prove at 0.1 and 0.3.
    statistics
        The statistics that BatchNorm normalises bounds with: `batch` or `running`; see
        `Statistics`. If several processes train, those of the images of each process.
    regularisation
        Weight of the two regularisers of Shi et al. 2021 (see `bound_regulariser.regulariser`), 0
        or more; they use 0.5. The warm-up of `training.curriculum` lowers it from this value at
        radius 0 to 0 at the whole radius. Without a warm-up it stays.
    weight
        Weight of the loss at the bounds, from 0 to 1.
    weight_warmup
        Whether the warm-up of `training.curriculum` increases the weight from 0 on, as Gowal et al.
        do, or the radius alone, as Shi et al. do.
    """

    def check_attack(self) -> None:
        """Raise `InputError` if there is an attack, since that is another method."""
        name = type(self.attack).__name__
        allowed = "none: training on bounds and on adversarial images is defense=mtl_ibp"
        ranges.require(is_none(self.attack), "attack", name, allowed)

    def combined(self, logits: Tensor, worst: Tensor, y: Tensor, loss: Loss) -> Tensor:
        """The weighted sum of the loss at images and the loss at the bounds."""
        at_bounds = self.weight * loss(worst, y)
        # Without it, the backward pass of the images is left out.
        return at_bounds if self.weight == 1 else (1 - self.weight) * loss(logits, y) + at_bounds


@dataclass
class MTLIBP(IBP):
    """min E[ (1 - weight) L(f(adv(x)), y) + weight L(m(x), y) ] (De Palma et al. 2024, MTL-IBP).

    "Expressive losses for verified robustness via convex combinations", with alpha = weight: the
    adversarial images replace x in the first loss of `IBP`. Everything else is the same. The paper
    has a constant alpha, which is `weight_warmup=false`.

    Parameters
    ----------
    attack
        Any attack but none.
    """

    def check_attack(self) -> None:
        """Raise `InputError` if there is no attack, since that is another method."""
        refuse_none(self.attack)
