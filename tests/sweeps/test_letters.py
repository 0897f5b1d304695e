"""Letters against their definition: two things share one if and only if they are not different."""

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from robusttrain.sweeps.letters import letters

Case = tuple[int, set[tuple[int, int]]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A number of things, and which pairs of them are different."""
    size = draw(st.integers(1, 8))
    pairs = [*combinations(range(size), 2)]
    chosen = draw(st.lists(st.booleans(), min_size=len(pairs), max_size=len(pairs)))
    return size, {pair for pair, is_chosen in zip(pairs, chosen, strict=True) if is_chosen}


def shared(display: list[str], left_out: str = "") -> set[tuple[int, int]]:
    """The pairs that share a letter, if one letter is left out."""
    sets = [{*each} - {*left_out} for each in display]
    return {(i, j) for i, j in combinations(range(len(sets)), 2) if sets[i] & sets[j]}


@given(cases())
def test_two_share_a_letter_if_and_only_if_they_are_not_different(case: Case) -> None:
    size, different = case
    display = letters(size, different)
    assert len(display) == size
    assert all(display)
    assert shared(display) == {*combinations(range(size), 2)} - different


@given(cases())
def test_no_letter_can_be_left_out(case: Case) -> None:
    display = letters(*case)
    for letter in {*"".join(display)}:
        is_alone = any({*each} == {letter} for each in display)
        assert is_alone or shared(display, letter) != shared(display)


def test_letters_of_a_ranking_are_those_that_tables_have() -> None:
    """Three neighbours of a ranking that only differ from the one after the next."""
    assert letters(4, {(0, 2), (0, 3), (1, 3)}) == ["a", "ab", "bc", "c"]
    assert letters(3, set()) == ["a", "a", "a"]
    assert letters(3, {(0, 1), (0, 2), (1, 2)}) == ["a", "b", "c"]


def test_there_is_a_name_for_every_letter() -> None:
    """Sixty things that all differ need sixty letters."""
    display = letters(60, {*combinations(range(60), 2)})
    assert len({*display}) == 60
