"""Positions of test images in the data set as published."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from robusttrain.data import image_index
from robusttrain.data.digits import Digits
from robusttrain.data.synthetic import Synthetic
from robusttrain.data.torchvision import Torchvision
from robusttrain.errors import InputError


@dataclass
class Own:
    """A data set with some positions."""

    positions: list[int]

    def test_positions(self) -> Tensor:
        return torch.tensor(self.positions)


@pytest.mark.parametrize("dataset", [Synthetic(), Torchvision("mnist")], ids=["synthetic", "mnist"])
def test_without_positions_the_order_is_that_of_the_test_set(dataset: object) -> None:
    found = image_index(dataset, 5)
    assert (found.positions.tolist(), found.counted_in) == ([0, 1, 2, 3, 4], "test set")
    assert found.files is None


def test_positions_are_those_that_a_data_set_returns() -> None:
    found = image_index(Own([7, 2, 30]), 3)
    assert (found.positions.tolist(), found.counted_in) == ([7, 2, 30], "data set")
    assert image_index(Digits(), 360).counted_in == "data set"


@pytest.mark.parametrize("positions", [[7, 2], [7, 2, 30, 4], [7, 2, 7]])
def test_positions_that_do_not_fit_the_test_set_are_refused(positions: list[int]) -> None:
    with pytest.raises(InputError, match=r"dataset\.test_positions .* each of the 3 test images"):
        image_index(Own(positions), 3)
