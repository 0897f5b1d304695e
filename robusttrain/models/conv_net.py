"""Plain convolutional networks without pooling."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from torch import nn

from robusttrain import ranges
from robusttrain.models.contrast import Contrast
from robusttrain.models.first_conv import FirstConv2d

# Usual kernel size by stride. A 4 x 4 kernel with stride 2 turns n pixels into n // 2 and covers
# each pixel equally often.
KERNELS = {1: 3, 2: 4}


@dataclass
class ConvNet:
    """Convolutions, some of which halve the image, and fully connected layers.

    The default is the network "large" of Wong et al. 2018 (Scaling provable adversarial defenses)
    for MNIST; `channels=[16, 32] strides=[2, 2] hidden=[100]` is their small one. If k convolutions
    halve the image, its sides need at least 2^k pixels.

    Parameters
    ----------
    channels
        Output channels of each convolution, 1 or more.
    strides
        Stride of each convolution: 1 to keep the size, 2 to halve it.
    hidden
        Widths of the affine layers before the last one, each 1 or more; may be empty.
    contrast
        Factor of the images' contrast before the first convolution, 1 or more; see `Contrast`.
    kernels
        Side of each kernel, 1 or more; if empty, 3 with stride 1, and 4 with stride 2. The padding
        of a kernel of side k is (k - 1) / 2, rounded down.
    batch_norm
        Whether BatchNorm follows each convolution and each affine layer but the last one.
    """

    channels: list[int] = field(default_factory=lambda: [32, 32, 64, 64])
    strides: list[int] = field(default_factory=lambda: [1, 2, 1, 2])
    hidden: list[int] = field(default_factory=lambda: [512, 512])
    contrast: float = 1.0
    kernels: list[int] = field(default_factory=list)
    batch_norm: bool = False

    def __post_init__(self) -> None:
        some = len(self.channels) > 0 and all(count >= 1 for count in self.channels)
        allowed = "a list of one or more whole numbers, each 1 or more"
        ranges.require(some, "channels", self.channels, allowed)
        fits = len(self.strides) == len(self.channels) and set(self.strides) <= set(KERNELS)
        allowed = f"a list of {len(self.channels)} numbers, as long as channels, each 1 or 2"
        ranges.require(fits, "strides", self.strides, allowed)
        sized = len(self.kernels) in (0, len(self.channels)) and all(k >= 1 for k in self.kernels)
        allowed = f"empty, or as long as channels: {len(self.channels)} numbers, each 1 or more"
        ranges.require(sized, "kernels", self.kernels, allowed)
        wide = all(width >= 1 for width in self.hidden)
        ranges.require(wide, "hidden", self.hidden, "a list of whole numbers, each 1 or more")
        ranges.at_least(1, contrast=self.contrast)

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        in_channels, height, width = image_shape
        layers: list[nn.Module] = [Contrast(self.contrast)] if self.contrast > 1 else []
        convolution: type[nn.Conv2d] = FirstConv2d
        kernels = self.kernels or [KERNELS[stride] for stride in self.strides]
        for (before, after), stride, kernel in zip(
            pairwise([in_channels, *self.channels]), self.strides, kernels, strict=True
        ):
            padding = (kernel - 1) // 2
            layers += [
                convolution(before, after, kernel, stride=stride, padding=padding),
                *self._normalised(nn.BatchNorm2d, after),
            ]
            convolution = nn.Conv2d
            height, width = (
                (side + 2 * padding - kernel) // stride + 1 for side in (height, width)
            )
        layers.append(nn.Flatten(1))
        features = [self.channels[-1] * height * width, *self.hidden]
        for before, after in pairwise(features):
            layers += [nn.Linear(before, after), *self._normalised(nn.BatchNorm1d, after)]
        return nn.Sequential(*layers, nn.Linear(features[-1], num_classes))

    def _normalised(self, norm: Callable[[int], nn.Module], features: int) -> list[nn.Module]:
        return [*([norm(features)] if self.batch_norm else []), nn.ReLU()]
