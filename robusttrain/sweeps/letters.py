"""A compact letter display: things that share a letter are not told apart."""

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations, count
from string import ascii_letters

Pair = tuple[int, int]
"""Two positions, the smaller one first."""


def letters(size: int, different: Collection[Pair]) -> list[str]:
    """The letters of `size` things, of which some pairs are significantly `different`.

    Two of them share a letter if and only if they are not different (Piepho 2004, Journal of
    Computational and Graphical Statistics 13, 456-466). Each letter stands for things of which no
    two are different; no letter can be left out. The first things get the first letters.

    >>> letters(3, [(0, 2)])
    ['a', 'ab', 'b']
    """
    alike = {pair for pair in combinations(range(size), 2) if pair not in different}
    groups = _needed(_groups(size, alike))
    names = dict(zip(sorted(groups), _names(), strict=False))
    return ["".join(name for group, name in names.items() if i in group) for i in range(size)]


def _groups(size: int, alike: Collection[Pair]) -> list[tuple[int, ...]]:
    """Groups of which no two members are different, as large as they can be, that have each pair.

    There are at most as many as pairs; all largest groups could be exponentially many.
    """
    groups: list[tuple[int, ...]] = []
    seen: set[Pair] = set()
    for pair in [*sorted(alike), *((i, i) for i in range(size))]:
        if pair not in seen:
            group = {*pair}
            for other in range(size):
                if all((min(i, other), max(i, other)) in alike for i in group - {other}):
                    group.add(other)
            groups.append(tuple(sorted(group)))
            seen.update(_pairs(groups[-1]))
    return groups


def _needed(groups: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The groups without those whose pairs are all in others."""
    kept = list(groups)
    for group in reversed(groups):
        others = [other for other in kept if other != group]
        if {*_pairs(group)} <= {pair for other in others for pair in _pairs(other)}:
            kept = others
    return kept


def _pairs(group: Sequence[int]) -> Iterator[Pair]:
    """The pairs in a group, and each member with itself."""
    yield from combinations(group, 2)
    yield from ((i, i) for i in group)


def _names() -> Iterator[str]:
    yield from ascii_letters
    yield from (f"{letter}{number}" for number in count(1) for letter in ascii_letters)
