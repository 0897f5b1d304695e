"""Which images an evaluation is on: `samples`, `indices` and `first`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robusttrain.errors import InputError
from robusttrain.evaluation import Evaluation


@given(st.permutations(range(12)), st.data())
def test_indices_choose_the_images_at_these_positions(
    order: list[int], data: st.DataObject
) -> None:
    """Of 7 test images of a data set of 12; their rows increase, whatever the order of indices."""
    positions = torch.tensor(order[:7])
    wanted = data.draw(st.lists(st.sampled_from(order[:7]), min_size=1, unique=True))
    rows = Evaluation(indices=wanted).located(positions).choose(7)
    assert sorted(positions[rows].tolist()) == sorted(wanted)
    assert rows.tolist() == sorted(rows.tolist())


@given(st.permutations(range(12)), st.integers(1, 7))
def test_first_chooses_the_smallest_positions(order: list[int], count: int) -> None:
    positions = torch.tensor(order[:7])
    rows = Evaluation(first=count, samples=3).located(positions).choose(7)
    assert sorted(positions[rows].tolist()) == sorted(order[:7])[:count]
    assert rows.tolist() == sorted(rows.tolist())


def test_samples_are_chosen_as_before() -> None:
    settings = Evaluation(samples=5)
    assert settings.located(torch.arange(10, 30)) is settings
    assert settings.choose(20).tolist() == Evaluation(samples=5).choose(20).tolist()
    assert len(settings.choose(20)) == 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Evaluation(indices=[4, 11]), r"indices=\[4, 11\] .*without a test image, \[11\]"),
        (Evaluation(first=4), "first=4 .*at most 3"),
    ],
)
def test_images_that_are_not_there_are_refused(settings: Evaluation, words: str) -> None:
    with pytest.raises(InputError, match=words):
        settings.located(torch.tensor([8, 4, 2]))
    with pytest.raises(
        InputError, match=words.replace("[11", "[4, 11").replace(r"\[11", r"\[4, 11")
    ):
        settings.choose(3)


def test_long_lists_are_shortened_in_messages() -> None:
    with pytest.raises(InputError, match=r"indices=\[0, 1, 2, 3, 4, \.\.\.\] .*, \[5, 6, 7\]: "):
        Evaluation(indices=[*range(8)]).choose(5)
