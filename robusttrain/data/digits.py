"""The 8x8 digits of scikit-learn, which need no download and only seconds of training."""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from robusttrain.data._base import _Base
from robusttrain.data.split import Info, Split
from robusttrain.seeding import generator_for

SIZE, TEST_SIZE = 1797, 360


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
        order = _order()
        return digits.take(order[TEST_SIZE:]), digits.take(order[:TEST_SIZE])

    def test_positions(self) -> Tensor:
        """The position of each test image in `load_digits()`, int64 (360,)."""
        return _order()[:TEST_SIZE]


def _order() -> Tensor:
    """The positions of all digits in `load_digits()`, those of the test set first."""
    return torch.randperm(SIZE, generator=generator_for(0, "digits test split"))
