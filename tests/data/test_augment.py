"""Augmentation against all images that shifting and mirroring can give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robusttrain.data import augment
from robusttrain.seeding import generator_for


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """The window of `image` (C, H, W) at an offset, zero outside: written pixel by pixel."""
    _, height, width = image.shape
    result = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            if 0 <= row + down < height and 0 <= column + right < width:
                result[:, row, column] = image[:, row + down, column + right]
    return result


def possible(image: Tensor, crop: int, flip: bool) -> list[Tensor]:
    steps = range(-crop, crop + 1)
    straight = [shifted(image, down, right) for down in steps for right in steps]
    return straight + [other.flip(2) for other in straight] * flip


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from([torch.uint8, torch.float32, torch.int64]),
    st.integers(0, 1000),
)
def test_every_result_is_a_shifted_or_mirrored_image(
    channels: int, height: int, width: int, crop: int, flip: bool, dtype: torch.dtype, seed: int
) -> None:
    generator = generator_for(seed, "augment")
    shape = (4, channels, height, width)
    images = torch.randint(1, 256, shape, generator=generator).to(dtype)
    before = images.clone()
    results = augment(images, crop, flip, generator)
    assert torch.equal(images, before)
    assert results.dtype == dtype
    assert results.shape == images.shape
    for image, result in zip(images, results, strict=True):
        assert any(torch.equal(result, other) for other in possible(image, crop, flip))


def test_all_offsets_and_both_directions_are_equally_likely() -> None:
    count, crop = 18_000, 1
    image = torch.arange(1, 13).view(1, 3, 4)
    candidates = torch.stack(possible(image, crop, flip=True))
    results = augment(image.expand(count, 1, 3, 4), crop, True, generator_for(0, "augment"))
    hits = (results[:, None] == candidates).flatten(2).all(2).sum(0)
    expected = count / len(candidates)
    # Chi-square with 17 degrees of freedom exceeds 40.8 once in a thousand draws.
    assert float(((hits - expected) ** 2 / expected).sum()) < 40.8
    assert int(hits.sum()) == count


def test_images_of_a_batch_move_on_their_own() -> None:
    images = torch.randint(1, 256, (1, 3, 8, 8)).expand(64, 3, 8, 8)
    results = augment(images, 2, True, generator_for(0, "augment"))
    assert len(results.unique(dim=0)) > 10


def test_the_generator_alone_decides() -> None:
    images = torch.arange(32 * 36).view(32, 1, 6, 6)
    global_state = torch.get_rng_state()
    first = augment(images, 2, True, generator_for(5, "augment"))
    assert torch.equal(torch.get_rng_state(), global_state)
    assert torch.equal(augment(images, 2, True, generator_for(5, "augment")), first)
    assert not torch.equal(augment(images, 2, True, generator_for(6, "augment")), first)


@pytest.mark.parametrize("size", [0, 3])
def test_without_shift_and_mirror_nothing_changes_and_nothing_is_drawn(size: int) -> None:
    images = torch.rand(size, 1, 4, 4)
    generator = generator_for(0, "augment")
    state = generator.get_state()
    assert torch.equal(augment(images, 0, False, generator), images)
    assert torch.equal(generator.get_state(), state)
