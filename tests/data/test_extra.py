"""Extra images: each batch has exactly its share of them, and each of them comes as often."""

from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robusttrain.data import Batches, Extra, Info, Split, batches, extra_samples, own_images
from robusttrain.data.digits import Digits
from robusttrain.errors import InputError
from robusttrain.seeding import generator_for

INFO = Info((3, 4, 5), 3, ("ant", "bee", "cat"))


def split(count: int, first: int = 0) -> Split:
    """Images whose label is their number."""
    labels = torch.arange(first, first + count)
    return Split((labels % 256).to(torch.uint8)[:, None, None, None], labels)


def mixture(
    size: int = 50, extra: int = 23, batch_size: int = 8, share: float = 0.25, **more: Any
) -> Batches:
    """Training images from 0 on, and extra ones from 1000 on."""
    return Batches(split(size), Extra(split(extra, 1000), share, seed=0), batch_size, **more)


def epoch(made: Batches, number: int = 1, first: int = 0) -> list[Tensor]:
    order = generator_for(0, f"order {number}")
    return [labels for _, labels in made.epoch(order, number, first)]


def extra_of(labels: Tensor) -> list[int]:
    return labels[labels >= 1000].tolist()


@given(
    size=st.integers(2, 90), extra=st.integers(1, 40), batch_size=st.integers(2, 24),
    share=st.floats(0.01, 0.99), parts=st.integers(1, 3), number=st.integers(1, 3),
)  # fmt: skip
def test_each_batch_has_its_share_rounded_half_upward(
    size: int, extra: int, batch_size: int, share: float, parts: int, number: int
) -> None:
    wanted = int(Fraction(share * batch_size) + Fraction(1, 2))
    if not 0 < wanted < batch_size or size < parts:
        return
    own = batch_size - wanted
    processes = [
        epoch(mixture(size, extra, batch_size, share, part=p, parts=parts), number)
        for p in range(parts)
    ]
    together = [torch.cat(some) for some in zip(*processes, strict=True)]
    for some in list(zip(*processes, strict=True))[:-1]:
        assert [len(extra_of(labels)) for labels in some] == [wanted] * parts
        assert [len(labels) for labels in some] == [batch_size] * parts
    for labels in together:
        there = len(labels) - len(extra_of(labels))
        assert len(extra_of(labels)) == int(Fraction(there * wanted, own) + Fraction(1, 2))
    # All training images once.
    assert sorted(y for labels in together for y in labels.tolist() if y < 1000) == list(
        range(size)
    )
    made = mixture(size, extra, batch_size, share, parts=parts)
    assert [made.images(place) for place in range(made.count)] == list(map(len, together))
    assert made.images_per_epoch == sum(map(len, together))


def test_all_extra_images_come_before_any_comes_again_through_the_epochs() -> None:
    made = mixture(50, 23)
    seen = [y for number in (1, 2, 3) for labels in epoch(made, number) for y in extra_of(labels)]
    assert len(seen) > 2 * 23
    for count in range(1, len(seen)):
        times = Counter(seen[:count])
        assert max(times.values()) - (min(times.values()) if len(times) == 23 else 0) <= 1
    assert seen[:23] != seen[23:46]


def test_batches_are_the_same_from_the_middle_of_an_epoch_on() -> None:
    whole = epoch(mixture(), 2)
    for first in range(len(whole)):
        rest = epoch(mixture(), 2, first)
        assert all(map(torch.equal, rest, whole[first:]))
        assert len(rest) == len(whole) - first


def test_images_keep_their_labels_and_places_are_mixed() -> None:
    places: list[int] = []
    for images, labels in mixture(200, 30, 16, 0.5).epoch(generator_for(0, "order")):
        assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels % 256)
        places += (labels >= 1000).nonzero().flatten().tolist()
    assert set(places) == set(range(16))


def test_without_extra_images_batches_are_as_ever() -> None:
    ours = Batches(split(50), None, 8).epoch(generator_for(0, "order"))
    theirs = batches(split(50), 8, generator_for(0, "order"))
    for some, others in zip(ours, theirs, strict=True):
        assert all(map(torch.equal, some, others))


@pytest.mark.parametrize(("share", "batch_size"), [(0.1, 4), (0.9, 4), (0.5, 1)])
def test_a_share_of_no_image_or_of_all_is_refused(share: float, batch_size: int) -> None:
    with pytest.raises(InputError, match=rf"dataset.extra_share={share} gives \d of the"):
        own_images(share, batch_size)


def saved(place: Path, x: Any, y: Any) -> str:
    np.savez(place / "extra.npz", image=x, label=y)
    return str(place / "extra.npz")


SHAPES: dict[tuple[int, ...], tuple[int, int, int]] = {
    (4, 5, 3): (3, 4, 5), (3, 4, 5): (3, 4, 5), (4, 5): (1, 4, 5), (4, 5, 1): (1, 4, 5),
    (3, 3, 2): (2, 3, 3),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_the_layout_is_the_one_that_gives_the_shape_of_the_data_set(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    x = np.random.default_rng(0).integers(0, 256, (6, *shape), dtype=np.uint8)
    info = INFO._replace(image_shape=SHAPES[shape])
    found = extra_samples(Digits(extra=saved(tmp_path, x, np.arange(6) % 3)), info)
    assert found is not None
    images = found.loaded().images
    assert images.shape[1:] == SHAPES[shape]
    last = shape[-1] == SHAPES[shape][0]
    expected = x.transpose(0, 3, 1, 2) if last and x.ndim == 4 else x.reshape(images.shape)
    assert torch.equal(images, torch.from_numpy(expected.copy()))


def test_labels_may_be_names_of_classes(tmp_path: Path) -> None:
    x = np.full((2, 3, 4, 5), 9, np.uint8)
    file = saved(tmp_path, x, np.array(["cat", "ant"]))
    found = extra_samples(Digits(extra=file), INFO)
    assert found is not None
    assert found.labels.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("shape", "label", "phrase"),
    [
        ((3, 4, 6), 0, "has images of 3x4x6: 4x5x3 or 3x4x5, as the data set"),
        ((4, 5), 0, "has images of 4x5"),
        ((3, 4, 5), 3, "has labels from 3 to 3: from 0 to 2"),
        ((3, 4, 5), "dog", "has labels that are no class: dog"),
    ],
)
def test_other_shapes_and_classes_are_refused(
    shape: tuple[int, ...], label: Any, phrase: str, tmp_path: Path
) -> None:
    file = saved(tmp_path, np.full((2, *shape), 9, np.uint8), np.array([label] * 2))
    with pytest.raises(InputError) as caught:
        extra_samples(Digits(extra=file), INFO)
    assert str(caught.value).startswith(f"dataset.extra={file} has ")
    assert phrase in str(caught.value)
