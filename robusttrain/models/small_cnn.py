"""The MNIST network of the fast adversarial training literature."""

from dataclasses import dataclass

from torch import nn

from robusttrain import ranges
from robusttrain.models.conv_net import ConvNet

HIDDEN = 100


@dataclass
class SmallCNN:
    """Two strided convolutions and two affine layers (Wong, Rice and Kolter 2020, on MNIST).

    Parameters
    ----------
    width
        The convolutions have `width` and 2 `width` channels. Images need at least 4 x 4 pixels.
    """

    width: int = 16

    def __post_init__(self) -> None:
        ranges.at_least(1, width=self.width)

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        network = ConvNet([self.width, 2 * self.width], [2, 2], [HIDDEN])
        return network.build(num_classes, image_shape)
