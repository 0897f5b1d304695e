"""The network of the MNIST challenge."""

from dataclasses import dataclass, field
from itertools import pairwise

from torch import nn

from robusttrain import ranges
from robusttrain.models.first_conv import FirstConv2d


@dataclass
class MadryCNN:
    """5 x 5 convolutions with max pooling, and one hidden layer (Madry et al. 2018).

    Parameters
    ----------
    channels
        Output channels of each convolution, 1 or more. A 2 x 2 max pool follows each of them, so k
        convolutions need images of at least 2^k x 2^k pixels.
    hidden
        Width of the hidden layer, 1 or more.
    """

    channels: list[int] = field(default_factory=lambda: [32, 64])
    hidden: int = 1024

    def __post_init__(self) -> None:
        ok = len(self.channels) > 0 and all(count >= 1 for count in self.channels)
        allowed = "a list of one or more whole numbers, each 1 or more"
        ranges.require(ok, "channels", self.channels, allowed)
        ranges.at_least(1, hidden=self.hidden)

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        in_channels, height, width = image_shape
        layers: list[nn.Module] = []
        for before, after in pairwise([in_channels, *self.channels]):
            convolution = nn.Conv2d if layers else FirstConv2d
            layers += [convolution(before, after, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        shrink = 2 ** len(self.channels)
        features = self.channels[-1] * (height // shrink) * (width // shrink)
        return nn.Sequential(
            *layers,
            nn.Flatten(1),
            nn.Linear(features, self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, num_classes),
        )
