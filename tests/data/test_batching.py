"""Batches: each image once, no single images, in an order that the generator determines."""

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robusttrain.data import Split, batch_count, batches
from robusttrain.seeding import generator_for


def numbered(size: int) -> Split:
    labels = torch.arange(size)
    return Split((labels % 256).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 2, 3, 4), labels)


def order(size: int, batch_size: int, seed: int | None) -> list[int]:
    generator = None if seed is None else generator_for(seed, "order")
    return torch.cat([y for _, y in batches(numbered(size), batch_size, generator)]).tolist()


@given(st.integers(1, 300), st.integers(2, 70), st.sampled_from([None, 0, 1]))
def test_every_image_comes_once_and_none_alone(
    size: int, batch_size: int, seed: int | None
) -> None:
    generator = None if seed is None else generator_for(seed, "order")
    made = list(batches(numbered(size), batch_size, generator))
    sizes = [len(y) for _, y in made]
    assert sorted(torch.cat([y for _, y in made]).tolist()) == list(range(size))
    assert len(made) == batch_count(size, batch_size)
    assert min(sizes) > 1 or size == 1
    assert max(sizes) <= batch_size + 1
    assert all(length == batch_size for length in sizes[:-1])


def test_images_arrive_as_floats_beside_their_own_labels() -> None:
    for x, y in batches(numbered(200), 32, generator_for(0, "order")):
        assert x.dtype == torch.float32
        assert x.shape == (len(y), 2, 3, 4)
        assert torch.equal((x[:, 1, 2, 3] * 255).round().long(), y)


def test_without_a_generator_the_order_is_kept() -> None:
    assert order(33, 8, None) == list(range(33))


def test_the_generator_alone_decides_the_order() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = order(100, 16, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert order(100, 16, 3) == first
    assert order(100, 16, 4) != first
    assert order(100, 7, 3) == first


def test_one_generator_gives_a_new_order_each_epoch() -> None:
    generator = generator_for(0, "order")
    epochs = [
        torch.cat([y for _, y in batches(numbered(50), 8, generator)]).tolist() for _ in range(2)
    ]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("size", [0, 1, 2])
def test_a_batch_size_of_one_gives_single_images(size: int) -> None:
    assert [len(y) for _, y in batches(numbered(size), 1, None)] == [1] * size
    assert batch_count(size, 1) == size


@given(st.integers(1, 300), st.integers(1, 20), st.integers(2, 5), st.integers(0, 3))
def test_parts_make_up_the_batches_of_all(
    size: int, batch_size: int, parts: int, first: int
) -> None:
    split = numbered(size)
    divided = [
        [y for _, y in batches(split, batch_size, generator_for(0, "order"), part=p, parts=parts)]
        for p in range(parts)
    ]
    whole = [torch.cat(each).tolist() for each in zip(*divided, strict=True)]
    assert len(whole) == batch_count(size, batch_size, parts)
    assert list(chain.from_iterable(whole)) == order(size, batch_size, 0)
    assert all(len(batch) == parts * batch_size for batch in whole[:-1])
    sizes = [len(each[-1]) for each in divided]
    assert max(sizes) - min(sizes) <= 1
    # No part has fewer than two images, unless there are no more.
    assert min(sizes) >= min(2, batch_size, size // parts)
    again = batches(split, batch_size, generator_for(0, "order"), first=first, part=1, parts=parts)
    assert [y.tolist() for _, y in again] == [y.tolist() for y in divided[1][first:]]
