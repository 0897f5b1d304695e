"""A synthetic problem of any size, for experiments without a data set."""

import math
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from robusttrain import ranges
from robusttrain.data._base import _Base
from robusttrain.data.split import Info, Split
from robusttrain.seeding import generator_for


@dataclass
class Synthetic(_Base):
    """One random smooth template per class, with Gaussian noise, clipped to the box.

    Labels cycle through the classes, so every stretch of a split is balanced.

    Parameters
    ----------
    image_shape
        Channels, height and width, each 1 or more.
    num_classes
        Classes, 2 or more.
    train_size, test_size
        Images of the training and of the test set, 1 or more.
    noise
        Standard deviation of a pixel, in units of [0, 1], 0 or more.
    seed
        Seed of the problem, which is independent of the run's: all seeds of a study have the same
        test set.
    """

    image_shape: list[int] = field(default_factory=lambda: [1, 8, 8])
    num_classes: int = 10
    train_size: int = 512
    test_size: int = 256
    noise: float = 0.15
    seed: int = 0
    _: KW_ONLY
    validation: float = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        shape_fits = len(self.image_shape) == 3 and min(self.image_shape) >= 1
        allowed = "three numbers (channels, height, width), each 1 or more"
        ranges.require(shape_fits, "image_shape", self.image_shape, allowed)
        ranges.at_least(2, num_classes=self.num_classes)
        ranges.at_least(1, train_size=self.train_size, test_size=self.test_size)
        ranges.at_least(0, noise=self.noise)

    def info(self) -> Info:
        channels, height, width = self.image_shape
        names = tuple(str(label) for label in range(self.num_classes))
        return Info((channels, height, width), self.num_classes, names)

    def load(self) -> tuple[Split, Split]:
        templates = self._templates()
        return (
            self._draw(templates, self.train_size, "synthetic train"),
            self._draw(templates, self.test_size, "synthetic test"),
        )

    def _templates(self) -> Tensor:
        """Uniform noise at a third of the resolution, upsampled: (num_classes, C, H, W)."""
        channels, height, width = self.image_shape
        coarse = (self.num_classes, channels, math.ceil(height / 3), math.ceil(width / 3))
        values = torch.rand(coarse, generator=generator_for(self.seed, "synthetic templates"))
        return interpolate(values, size=(height, width), mode="bilinear", align_corners=False)

    def _draw(self, templates: Tensor, size: int, name: str) -> Split:
        labels = torch.arange(size) % self.num_classes
        images = templates[labels]
        noise = torch.randn(images.shape, generator=generator_for(self.seed, name))
        noisy = (images + self.noise * noise).clamp_(0, 1)
        return Split((noisy * 255).round().to(torch.uint8), labels)
