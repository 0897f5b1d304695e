"""Wide residual networks."""

from dataclasses import dataclass, field

from torch import nn

from robusttrain import ranges
from robusttrain.models._residual import residual_layers
from robusttrain.models.normalize import Normalize, check_statistics

STEM = 16


@dataclass
class WideResNet:
    """WRN-`depth`-`width` (Zagoruyko and Komodakis 2016), by default WRN-28-10.

    Parameters
    ----------
    depth
        Three stages have (depth - 4) / 6 blocks each.
    width
        The stages have 16, 32 and 64 times `width` channels.
    dropout
        Share of activations that are zeroed inside a block in train mode, from 0 to below 1; drawn
        from torch's global random stream.
    mean, std
        Normalisation of the images, in pixel units; 1 entry, or one per channel.
    """

    depth: int = 28
    width: int = 10
    dropout: float = 0.0
    mean: list[float] = field(default_factory=lambda: [0.5])
    std: list[float] = field(default_factory=lambda: [0.25])

    def __post_init__(self) -> None:
        ok = self.depth >= 10 and (self.depth - 4) % 6 == 0
        ranges.require(ok, "depth", self.depth, "4 plus a multiple of 6: 10, 16, 22, 28, ...")
        ranges.at_least(1, width=self.width)
        ok = 0 <= self.dropout < 1
        ranges.require(ok, "dropout", self.dropout, "from 0 to 1, 1 excluded")
        check_statistics(self.mean, self.std)

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        channels = image_shape[0]
        blocks = [(self.depth - 4) // 6] * 3
        widths = [STEM, *(STEM * self.width * 2**stage for stage in range(3))]
        layers = residual_layers(channels, widths, blocks, num_classes, self.dropout)
        return nn.Sequential(Normalize(self.mean, self.std, channels), *layers)
