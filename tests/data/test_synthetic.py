"""The synthetic problem: reproducible, balanced, learnable."""

from typing import Any

import pytest
import torch

from robusttrain.data import as_input
from robusttrain.data.synthetic import Synthetic
from robusttrain.errors import InputError


@pytest.mark.parametrize("shape", [[1, 8, 8], [3, 5, 9], [2, 1, 1]])
def test_info_agrees_with_the_loaded_data(shape: list[int]) -> None:
    made = Synthetic(image_shape=shape, num_classes=4, train_size=30, test_size=20)
    train, test = made.load()
    assert (train.size, test.size) == (30, 20)
    assert train.images.shape[1:] == test.images.shape[1:] == made.info().image_shape
    assert train.images.dtype == torch.uint8
    assert train.labels.bincount().tolist() == [8, 8, 7, 7]
    assert len(made.info().class_names) == made.info().num_classes == 4


def test_the_nearest_class_mean_solves_it() -> None:
    train, test = Synthetic().load()
    x, z = as_input(train.images).flatten(1), as_input(test.images).flatten(1)
    means = torch.stack([x[train.labels == label].mean(0) for label in range(10)])
    guesses = torch.cdist(z, means).argmin(1)
    assert float((guesses == test.labels).float().mean()) > 0.95


def test_the_noise_has_the_given_standard_deviation() -> None:
    quiet = as_input(Synthetic(noise=0, train_size=2000).load()[0].images)
    noisy = as_input(Synthetic(noise=0.05, train_size=2000).load()[0].images)
    unclipped = (quiet - 0.5).abs() < 0.3
    assert float((noisy - quiet)[unclipped].std()) == pytest.approx(0.05, rel=0.02)


def test_only_the_seed_decides_and_the_parts_are_independent() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    test = Synthetic().load()[1].digest()
    assert torch.equal(torch.get_rng_state(), state)
    assert Synthetic(train_size=100).load()[1].digest() == test
    assert Synthetic(seed=1).load()[1].digest() != test
    train, same_size = Synthetic(train_size=64, test_size=64).load()
    assert train.digest() != same_size.digest()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_shape": [8, 8]}, "image_shape=.*three numbers"),
        ({"image_shape": [1, 0, 8]}, "image_shape=.*1 or more"),
        ({"num_classes": 1}, "num_classes=1 "),
        ({"train_size": 0}, "train_size=0 "),
        ({"test_size": 0}, "test_size=0 "),
        ({"noise": -1.0}, "noise=-1.0 "),
        ({"crop": -1}, "crop=-1 "),
    ],
)
def test_impossible_fields_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Synthetic(**values)
