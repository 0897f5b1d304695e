"""The bundled digits, and the fields that every data set shares."""

import pytest
import torch
from sklearn.datasets import load_digits

from robusttrain.data.digits import Digits
from robusttrain.errors import InputError


def test_the_two_parts_are_scikit_learns_digits_in_bytes() -> None:
    parts = Digits().load()
    assert [part.size for part in parts] == [1437, 360]
    bunch = load_digits()
    rows = torch.cat([torch.cat([p.images.flatten(1).long(), p.labels[:, None]], 1) for p in parts])
    # 16 levels over 255: the level comes back from the byte.
    levels = torch.cat([(rows[:, :64] * 16 / 255).round().long(), rows[:, 64:]], 1)
    expected = torch.cat(
        [torch.tensor(bunch.data).long(), torch.tensor(bunch.target)[:, None].long()], 1
    )
    assert torch.equal(levels.unique(dim=0), expected.unique(dim=0))
    assert len(levels) == len(expected)
    assert rows[:, :64].max() == 255
    assert rows[:, :64].min() == 0


def test_info_agrees_with_the_loaded_data() -> None:
    info = Digits().info()
    train, test = Digits().load()
    for part in (train, test):
        assert part.images.shape[1:] == info.image_shape == (1, 8, 8)
        assert part.images.dtype == torch.uint8
        assert part.labels.dtype == torch.int64
        assert part.labels.unique().tolist() == list(range(info.num_classes))
    assert info.class_names[3] == "3"


def test_the_test_set_is_fixed_and_global_randomness_untouched() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = Digits().load()[1].digest()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert Digits().load()[1].digest() == first


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"crop": -1}, "crop=-1"),
        ({"validation": -0.1}, "validation=-0.1"),
        ({"validation": float("nan")}, "validation=nan"),
        ({"validation": float("inf")}, "validation=inf"),
        ({"validation": 1.5}, "validation=1.5 .*a share below 1 or a whole number of images"),
    ],
)
def test_impossible_fields_are_refused_by_name(values: dict[str, float], key: str) -> None:
    with pytest.raises(InputError, match=key):
        Digits(**values)  # type: ignore[arg-type]


def test_positions_find_the_test_images_in_scikit_learns_digits() -> None:
    positions, test = Digits().test_positions(), Digits().load()[1]
    bunch = load_digits()
    found = torch.from_numpy(bunch.images[positions] * (255 / 16)).round().to(torch.uint8)
    assert torch.equal(found[:, None], test.images)
    assert bunch.target[positions].tolist() == test.labels.tolist()
