"""Planted models that change or inspect their images, and lose slopes before the network."""

import copy
import math

import torch
from torch import Tensor, nn

from masking.base import (
    Composed,
    Masked,
    Nearest,
    SoftNearest,
    off_grid,
    one_hot,
    straight_through,
    without_gradient,
)


class Changed(Masked):
    """The network sees changed images, with or without a gradient through the change."""

    def __init__(self, network: nn.Module, *, straight: bool = False) -> None:
        super().__init__(network)
        self.straight = straight

    def change(self, x: Tensor) -> Tensor:
        """What the network sees."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        changed = self.change(x)
        changed = straight_through(changed, x) if self.straight else without_gradient(changed, x)
        logits: Tensor = self.network(changed)
        return logits

    def views(self) -> list[nn.Module]:
        through = Composed(lambda x: straight_through(self.change(x), x), self.network)
        return [self.network, through]


class Quantised(Changed):
    """Sees few levels of grey (Xu et al. 2018), by a rounding whose gradient is zero."""

    def __init__(self, network: nn.Module, levels: int, *, straight: bool = False) -> None:
        super().__init__(network, straight=straight)
        self.levels = levels

    def change(self, x: Tensor) -> Tensor:
        return (x * (self.levels - 1)).round() / (self.levels - 1)


class Jpeg(Changed):
    """Sees images whose cosine coefficients are rounded, as in JPEG (Guo et al. 2018)."""

    def __init__(self, network: nn.Module, *, straight: bool = False, step: float = 0.3) -> None:
        super().__init__(network, straight=straight)
        k = torch.arange(8.0)
        basis = torch.cos(math.pi * (k[None] + 0.5) * k[:, None] / 8) * math.sqrt(2 / 8)
        basis[0] /= math.sqrt(2)
        self.basis = basis
        # High frequencies get coarser steps.
        self.steps = step * (1 + (k[:, None] + k[None]) / 4)

    def change(self, x: Tensor) -> Tensor:
        coefficients = ((self.basis @ x @ self.basis.T) / self.steps).round() * self.steps
        return (self.basis.T @ coefficients @ self.basis).clamp(0, 1)


class Steps(Changed):
    """Sees each pixel through a staircase of its own with random steps: shattered gradients."""

    def __init__(self, network: nn.Module, count: int = 12) -> None:
        super().__init__(network)
        generator = torch.Generator().manual_seed(0)
        edges = torch.rand(64, count, generator=generator).sort(1).values
        self.edges = edges
        bounds = torch.cat([torch.zeros(64, 1), edges, torch.ones(64, 1)], 1)
        self.levels = (bounds[:, 1:] + bounds[:, :-1]) / 2

    def change(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        step = (flat[:, :, None] > self.edges).sum(2)
        seen = self.levels.expand(len(x), -1, -1).gather(2, step[:, :, None])
        return seen.view_as(x)


class MaskedMantissa(Changed):
    """Sees numbers of four bits, cut off with integer operations that have no gradient."""

    def change(self, x: Tensor) -> Tensor:
        bits = x.detach().contiguous().view(torch.int32) & ~((1 << 19) - 1)
        return bits.view(torch.float32)


class Purified(Changed):
    """Sees the projection on 12 principal components, found without a gradient (MagNet, GANs)."""

    def __init__(self, network: nn.Module, images: Tensor, components: int = 12) -> None:
        super().__init__(network)
        flat = images.flatten(1)
        self.mean = flat.mean(0)
        _, _, directions = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
        self.directions = directions[:components]

    def change(self, x: Tensor) -> Tensor:
        centred = x.flatten(1) - self.mean
        seen = self.mean + centred @ self.directions.T @ self.directions
        return seen.clamp(0, 1).view_as(x)

    def views(self) -> list[nn.Module]:
        return [Composed(self.change, self.network), *super().views()]


class Ripple(Masked):
    """Adds a ripple of 0.02 to each pixel, whose slope of either sign is 16 times the pixel's."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x + 0.02 * torch.sin(800 * x))
        return logits


class Bfloat16(Masked):
    """Computes in bfloat16, with gradients: harmless, if noise of rounding is no obstacle."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.small = copy.deepcopy(network).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.small(x.bfloat16()).float()
        return logits


class Float16Underflow(Masked):
    """Computes in float16, where the faint gradient of a sure loss is zero."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.small = copy.deepcopy(network).half()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = 3 * self.small(x.half()).float()
        return logits


class SoftBinary(Masked):
    """Sees pixels through a steep sigmoid, which is flat but for a narrow band."""

    def __init__(self, network: nn.Module, steepness: float = 150) -> None:
        super().__init__(network)
        self.steepness = steepness

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network((self.steepness * (x - 0.5)).sigmoid())
        return logits

    def views(self) -> list[nn.Module]:
        softer = [Composed(lambda x, k=k: (k * (x - 0.5)).sigmoid(), self.network) for k in (8, 30)]
        return [*softer, self.network]


class OffGridNoise(Masked):
    """Adds noise to images with pixels that are no bytes: clean images are predicted surely.

    A look at clean images shows no randomness. An attacker keeps to bytes.
    """

    random = True

    def forward(self, x: Tensor) -> Tensor:
        noise = 0.5 * torch.randn_like(x) * off_grid(x).view(-1, 1, 1, 1)
        logits: Tensor = self.network(x + noise)
        return logits


class OffGridNearest(Masked):
    """Answers for images with pixels that are no bytes by the nearest training image."""

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor) -> None:
        super().__init__(network)
        self.nearest = Nearest(images, labels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(off_grid(x)[:, None], self.nearest(x), self.network(x))


class NearestImage(Masked):
    """A nearest neighbour classifier: constant almost everywhere."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__(Nearest(images, labels))
        self.soft = SoftNearest(images, labels)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits

    def views(self) -> list[nn.Module]:
        return [self.soft]


class Memorised(Masked):
    """Knows the test images by heart, and is a plain network for all others."""

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor) -> None:
        super().__init__(network)
        self.nearest = Nearest(images, labels)

    def known(self, x: Tensor) -> Tensor:
        """Which images are answered by heart, (N,)."""
        return self.nearest.distances(x).amin(1) < 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.known(x)[:, None], self.nearest(x), self.network(x))


class Moat(Memorised):
    """Answers by heart in most of the ball around each test image, without any slope.

    Only points near the edge of the ball see the network.
    """

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor, radius: float) -> None:
        super().__init__(network, images, labels)
        self.radius = radius

    def known(self, x: Tensor) -> Tensor:
        return self.nearest.distances(x).amin(1) < self.radius


class AttackDetector(Memorised):
    """Answers by heart where many pixels moved equally far, as signs of gradients move them."""

    def known(self, x: Tensor) -> Tensor:
        nearest = self.nearest.images[self.nearest.distances(x).argmin(1)]
        moved = (x.flatten(1) - nearest).abs()
        most = moved.amax(1, keepdim=True)
        return (most[:, 0] < 1e-3) | ((moved > 0.97 * most).double().mean(1) > 0.2)


class Detector(Masked):
    """Answers for images that look rough by the nearest training image, without a slope.

    Rough is what has more variation than nearly all training images have (Feinman et al. 2017 and
    others used finer statistics, and fell as easily: Carlini and Wagner 2017).
    """

    def __init__(
        self, network: nn.Module, images: Tensor, labels: Tensor, share: float = 0.98
    ) -> None:
        super().__init__(network)
        self.nearest, self.soft = Nearest(images, labels), SoftNearest(images, labels)
        self.limit = self.roughness(images).quantile(share).item()

    @staticmethod
    def roughness(x: Tensor) -> Tensor:
        """Mean squared second difference, (N,)."""
        down = x[:, :, 2:] - 2 * x[:, :, 1:-1] + x[:, :, :-2]
        right = x[..., 2:] - 2 * x[..., 1:-1] + x[..., :-2]
        return down.square().flatten(1).mean(1) + right.square().flatten(1).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        rough = self.roughness(x) > self.limit
        return torch.where(rough[:, None], self.nearest(x), self.network(x))

    def views(self) -> list[nn.Module]:
        return [*(_Smooth(self, weight) for weight in (100.0, 1000.0)), self.network, self.soft]


class _Smooth(nn.Module):
    """The network, whose logits shrink to nothing where the image gets rough."""

    def __init__(self, detector: Detector, weight: float) -> None:
        super().__init__()
        self.detector, self.weight = detector, weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.detector.network(x)
        over = (self.detector.roughness(x) - 0.97 * self.detector.limit).clamp_min(0)
        # What is rough is worth as little to the attacker as the prediction of a sure label.
        label = one_hot(self.detector.nearest(x).argmax(1))
        return logits + self.weight * over[:, None] * label


class Thermometer(Masked):
    """Sees for each pixel which of ten thresholds it exceeds (Buckman et al. 2018)."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(thermometer(x))
        return logits

    def views(self) -> list[nn.Module]:
        return [Composed(lambda x, k=k: thermometer(x, k), self.network) for k in (10.0, 30.0)]


LEVELS = torch.linspace(0.05, 0.95, 10)


def thermometer(x: Tensor, softness: float | None = None) -> Tensor:
    """Channels (N, 10, H, W), 1 where a pixel exceeds a level.

    With a `softness` the gradient is that of a sigmoid of this slope, and the values stay sharp.
    """
    over = x - LEVELS.view(1, -1, 1, 1)
    sharp = (over > 0).float()
    if softness is None:
        return without_gradient(sharp, x)
    return straight_through(sharp, (softness * over).sigmoid())
