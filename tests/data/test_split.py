"""Splits, their conversion to inputs, and holding out a validation part."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robusttrain.data import Split, as_input, hold_out
from robusttrain.errors import InputError


def numbered(size: int) -> Split:
    """A split whose labels are 0, 1, 2, ... and whose images are filled with label mod 256."""
    labels = torch.arange(size)
    return Split((labels % 256).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 2, 3, 4), labels)


def same(a: Split, b: Split) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_bytes_become_floats_from_0_to_1_in_order() -> None:
    inputs = as_input(torch.arange(256).to(torch.uint8).view(1, 1, 16, 16))
    assert inputs.dtype == torch.float32
    flat = inputs.flatten()
    assert flat[0] == 0
    assert flat[255] == 1
    assert torch.equal((flat * 255).round(), torch.arange(256.0))


def test_as_input_leaves_the_bytes_alone() -> None:
    images = torch.full((1, 1, 2, 2), 7, dtype=torch.uint8)
    as_input(images).zero_()
    assert bool((images == 7).all())


def test_take_picks_images_and_labels_together() -> None:
    taken = numbered(300).take(torch.tensor([299, 3, 3]))
    assert taken.labels.tolist() == [299, 3, 3]
    assert taken.images[:, 0, 0, 0].tolist() == [43, 3, 3]


@given(st.integers(0, 23), st.integers(1, 255))
def test_the_digest_changes_with_any_byte(position: int, change: int) -> None:
    split = numbered(1)
    images = split.images.clone()
    images.view(-1)[position] = change
    assert Split(images, split.labels).digest() != split.digest()


def test_the_digest_changes_with_a_label_and_only_then() -> None:
    split = numbered(5)
    assert numbered(5).digest() == split.digest()
    assert Split(split.images, split.labels + 1).digest() != split.digest()
    assert len(split.digest()) == 64


def test_the_digest_is_of_values_not_of_memory_layout() -> None:
    split = numbered(6)
    layout = split.images.contiguous(memory_format=torch.channels_last)
    assert Split(layout, split.labels).digest() == split.digest()


def test_an_empty_split_has_a_digest() -> None:
    assert len(numbered(0).digest()) == 64


@given(st.integers(1, 60), st.floats(0, 70), st.integers(0, 5))
def test_hold_out_is_a_partition_or_refused(size: int, validation: float, seed: int) -> None:
    split = numbered(size)
    count = round(validation * size) if validation < 1 else int(validation)
    if count >= size:
        with pytest.raises(InputError, match=rf"validation={validation}.*{size} training images"):
            hold_out(split, validation, seed)
        return
    train, held = hold_out(split, validation, seed)
    assert held.size == count
    assert sorted(train.labels.tolist() + held.labels.tolist()) == list(range(size))
    for part in (train, held):
        assert same(part, split.take(part.labels))


def test_hold_out_depends_on_the_seed_alone() -> None:
    split = numbered(500)
    torch.manual_seed(1)
    first = hold_out(split, 0.2, 7)[1]
    torch.manual_seed(2)
    assert same(hold_out(split, 0.2, 7)[1], first)
    assert not same(hold_out(split, 0.2, 8)[1], first)


def test_no_validation_keeps_everything_for_training() -> None:
    train, held = hold_out(numbered(10), 0, 3)
    assert same(train, numbered(10))
    assert held.size == 0
    assert held.images.shape == (0, 2, 3, 4)
