"""Learn2Perturb (Jeddi et al. 2020)."""

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from robusttrain import ranges
from robusttrain.noise.layer import (
    NoiseLayer,
    Progress,
    Switches,
    attach,
    standard_normal,
    untraced,
)
from robusttrain.noise.placement import layers_for
from robusttrain.seeding import derived_seed


@dataclass
class Learn2Perturb(Switches):
    """z + sigma n at the output of every convolution, n ~ N(0, 1), a learnable sigma per entry.

    Jeddi et al. 2020. Training adds -gamma / tau sum(sqrt(sigma)) to the loss, with
    tau = 1 + 1/2 + ... + 1/epoch, so that the noise does not vanish. Sigma is exp(parameter), which
    is positive. Weights and sigmas are updated in the same step, while the paper alternates.

    Parameters
    ----------
    initial
        Sigma at the start, above 0.
    gamma
        Weight of the regulariser, 0 or more.
    """

    initial: float = 0.1
    gamma: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.above(0, initial=self.initial)
        ranges.at_least(0, gamma=self.gamma)

    def unused(self) -> dict[str, str]:
        """Also the regulariser, without noise in training."""
        return super().unused() | ({} if self.train else {"gamma": "train"})

    def install(self, model: nn.Module, seed: int) -> None:
        """Add the noise to `model`; the sigmas get their shapes in the first pass.

        Raises
        ------
        InputError
            If the model has no convolution.
        """
        for number, place in enumerate(layers_for("learn2perturb", model, nn.Conv2d)):
            layer = _Perturbation(self, derived_seed(seed, f"learn2perturb {number}"))
            attach(model, layer, place)
            place.register_forward_hook(layer.after)


class _Perturbation(NoiseLayer):
    def __init__(self, settings: Learn2Perturb, seed: int) -> None:
        super().__init__(settings, seed)
        self.settings = settings
        self.log_sigma: nn.Parameter | UninitializedParameter = UninitializedParameter()

    @untraced
    def after(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if isinstance(self.log_sigma, UninitializedParameter):
            self.log_sigma.materialize(output.shape[1:], device=output.device)
            nn.init.constant_(self.log_sigma, math.log(self.settings.initial))
        return super().after(module, arguments, output)

    def perturb(self, x: Tensor) -> Tensor:
        return x + self.log_sigma.exp() * self.drawn(x, standard_normal)

    def penalty(self, progress: Progress) -> Tensor:
        tau = sum(1 / epoch for epoch in range(1, progress.epoch + 1))
        # sqrt(sigma) = exp(log_sigma / 2)
        roots: Tensor = (self.log_sigma / 2).exp()
        return -self.settings.gamma / tau * roots.sum()
