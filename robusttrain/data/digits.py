"""The 8x8 digits of scikit-learn, which need no download and only seconds of training."""

from dataclasses import KW_ONLY, dataclass

import torch

from robusttrain.data._base import _Base
from robusttrain.data.split import Info, Split
from robusttrain.seeding import generator_for

TEST_SIZE = 360


@dataclass
class Digits(_Base):
    """1,797 handwritten digits of 8x8 pixels: 1,437 for training, 360 for the test.

    The test set is the same for every seed, so that runs with different seeds can be compared image
    by image.
    """

    _: KW_ONLY
    validation: float = 150

    def info(self) -> Info:
        return Info((1, 8, 8), 10, tuple("0123456789"))

    def load(self) -> tuple[Split, Split]:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        # A pixel is the number of inked dots in a 4x4 block, from 0 to 16.
        images = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)
        digits = Split(images.unsqueeze(1), torch.from_numpy(bunch.target).long())
        order = torch.randperm(digits.size, generator=generator_for(0, "digits test split"))
        return digits.take(order[TEST_SIZE:]), digits.take(order[:TEST_SIZE])
