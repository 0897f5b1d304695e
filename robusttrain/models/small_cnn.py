"""The MNIST network of the fast adversarial training literature."""

from dataclasses import dataclass

from torch import nn

from robusttrain import ranges
from robusttrain.models.first_conv import FirstConv2d

HIDDEN = 100


@dataclass
class SmallCNN:
    """Two strided convolutions and two affine layers (Wong, Rice and Kolter 2020, on MNIST).

    The convolutions have `width` and 2 `width` channels. Images have 4 x 4 pixels at least.
    """

    width: int = 16

    def __post_init__(self) -> None:
        ranges.at_least(1, width=self.width)

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        channels, height, width = image_shape
        # A 4 x 4 kernel with stride 2 and padding 1 turns n pixels into n // 2.
        features = 2 * self.width * (height // 4) * (width // 4)
        return nn.Sequential(
            FirstConv2d(channels, self.width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(self.width, 2 * self.width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(1),
            nn.Linear(features, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, num_classes),
        )
