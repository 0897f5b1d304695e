"""Random self-ensemble (Liu et al. 2018)."""

from dataclasses import dataclass

from torch import nn

from robusttrain import ranges
from robusttrain.noise.additive import AdditiveLayer
from robusttrain.noise.gaussian import Gaussian
from robusttrain.noise.layer import Switches, attach
from robusttrain.noise.placement import layers_for
from robusttrain.seeding import derived_seed


@dataclass
class RSE(Switches):
    """Gaussian noise before every convolution, in training and prediction (Liu et al. 2018).

    A prediction averages the softmax over `evaluation.votes` draws.

    Parameters
    ----------
    initial
        Standard deviation before the first convolution, 0 or more; in pixel units if that is the
        first layer.
    inner
        Standard deviation before the other convolutions, 0 or more.
    """

    initial: float = 0.2
    inner: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.at_least(0, initial=self.initial, inner=self.inner)

    def refuse_without_effect(self) -> None:
        """Raise `InputError` if the noise is 0, or never drawn."""
        super().refuse_without_effect()
        some = self.initial > 0 or self.inner > 0
        ranges.require(some, "initial", self.initial, "above 0 when inner=0")

    def install(self, model: nn.Module, seed: int) -> None:
        """Add the noise to `model`.

        Raises
        ------
        InputError
            If the model has no convolution.
        """
        for number, convolution in enumerate(layers_for("rse", model, nn.Conv2d)):
            noise = Gaussian(self.inner if number else self.initial)
            layer = AdditiveLayer(noise, self, derived_seed(seed, f"rse {number}"))
            attach(model, layer, convolution)
            convolution.register_forward_pre_hook(layer.before)
