"""Residual networks with pre-activation for small images."""

from dataclasses import dataclass, field

from torch import nn

from robusttrain import ranges
from robusttrain.models._residual import residual_layers
from robusttrain.models.normalize import Normalize, check_statistics


@dataclass
class PreActResNet:
    """Pre-activation ResNet with a 3 x 3 stem (He et al. 2016, "Identity mappings").

    Parameters
    ----------
    blocks
        Number of basic blocks in each stage; [2, 2, 2, 2] is the ResNet-18 of the adversarial
        training literature.
    width
        Channels of the first stage. Each further stage doubles them and halves the resolution.
    mean, std
        Normalisation of the images, in pixel units; 1 entry, or one per channel.
    """

    blocks: list[int] = field(default_factory=lambda: [2, 2, 2, 2])
    width: int = 64
    mean: list[float] = field(default_factory=lambda: [0.5])
    std: list[float] = field(default_factory=lambda: [0.25])

    def __post_init__(self) -> None:
        ok = len(self.blocks) > 0 and all(count >= 1 for count in self.blocks)
        allowed = "a list of one or more whole numbers, each 1 or more"
        ranges.require(ok, "blocks", self.blocks, allowed)
        ranges.at_least(1, width=self.width)
        check_statistics(self.mean, self.std)

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        channels = image_shape[0]
        widths = [self.width, *(self.width * 2**stage for stage in range(len(self.blocks)))]
        layers = residual_layers(channels, widths, self.blocks, num_classes, dropout=0.0)
        return nn.Sequential(Normalize(self.mean, self.std, channels), *layers)
