"""Planted models whose outputs give no attack a slope to climb."""

import torch
from torch import Tensor, nn

from masking.base import Masked, one_hot, without_gradient


class HardLabels(Masked):
    """Outputs the class alone, with the gradient of another, untrained network."""

    def __init__(self, network: nn.Module, decoy: nn.Module) -> None:
        super().__init__(network)
        self.decoy = decoy

    def forward(self, x: Tensor) -> Tensor:
        decoy = self.decoy(x)
        return decoy + (5 * one_hot(self.network(x).argmax(1)) - decoy).detach()


class HardLabelsFlat(Masked):
    """Outputs the class alone, without any gradient: an API that returns labels."""

    def forward(self, x: Tensor) -> Tensor:
        return without_gradient(5 * one_hot(self.network(x).argmax(1)), x)


class Top1(Masked):
    """Outputs the probability of the predicted class, and nothing about the others."""

    def forward(self, x: Tensor) -> Tensor:
        probabilities = self.network(x).softmax(1)
        return probabilities * one_hot(probabilities.argmax(1))


class Softmax(Masked):
    """Outputs probabilities of sharpened logits in place of logits, which saturate."""

    def __init__(self, network: nn.Module, sharpness: float) -> None:
        super().__init__(network)
        self.sharpness = sharpness

    def forward(self, x: Tensor) -> Tensor:
        probabilities: Tensor = (self.sharpness * self.network(x)).softmax(1)
        return probabilities


class Affine(Masked):
    """Outputs logits of another scale and offset: the loss saturates, or drowns in rounding."""

    def __init__(self, network: nn.Module, scale: float, offset: float = 0) -> None:
        super().__init__(network)
        self.scale, self.offset = scale, offset

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.scale * self.network(x) + self.offset
        return logits


class Temperature(Masked):
    """Weights of the last layer times 100 (defensive distillation, Papernot et al. 2016)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
        with torch.no_grad():
            last.weight.mul_(100)
            last.bias.mul_(100)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits


class RoundedLogits(Masked):
    """Outputs logits to the nearest whole number: flat steps."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        return without_gradient(logits.round(), x)


class RoundedConfidences(Masked):
    """Outputs probabilities to two decimals, as an API does, without gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return without_gradient(self.network(x).softmax(1).mul(100).round() / 100, x)


class ClampedLog(Masked):
    """Outputs log(max(p, 1e-7)) of sharp probabilities, whose clamp has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return (50 * self.network(x)).softmax(1).clamp_min(1e-7).log()


class OutputCodes(Masked):
    """Outputs how well saturated bits fit the code word of a class (Verma and Swami 2019)."""

    def __init__(self, network: nn.Module, sharpness: float = 100) -> None:
        super().__init__(network)
        self.sharpness = sharpness
        codes = torch.ones(1, 1)
        for _ in range(4):
            codes = torch.cat([torch.cat([codes, codes], 1), torch.cat([codes, -codes], 1)])
        self.codes = codes[1:11, 1:]

    def bits(self, x: Tensor, sharpness: float) -> Tensor:
        """Logits (N, 10) of bits of this sharpness."""
        bits = (sharpness * self.network(x).log_softmax(1).exp() @ self.codes).tanh()
        logits: Tensor = bits @ self.codes.T
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.bits(x, self.sharpness)

    def views(self) -> list[nn.Module]:
        return [self.network, _SoftBits(self)]


class _SoftBits(nn.Module):
    def __init__(self, coded: OutputCodes) -> None:
        super().__init__()
        self.coded = coded

    def forward(self, x: Tensor) -> Tensor:
        return self.coded.bits(x, 1)


class FrozenEnsemble(Masked):
    """Adds a frozen network under `no_grad` to a small and weak one: the gradient is of the latter.

    Outputs are true logits, with margins that fall as they should; the slope is another network's.
    """

    def __init__(self, network: nn.Module, weak: nn.Module) -> None:
        super().__init__(network)
        self.weak = weak

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = self.network(x)
        logits: Tensor = frozen + 0.05 * self.weak(x)
        return logits
