"""What a mistyped word of the command line was probably meant to be."""

import dataclasses
import difflib
import shlex
from collections.abc import Iterable, Sequence
from itertools import pairwise

from robusttrain.config.declarations import declared
from robusttrain.config.folders import CONF


def nearest(word: str, known: Iterable[str], count: int = 1) -> list[str]:
    """Up to `count` of the `known` words that resemble `word`, whatever its case; best first."""
    by_lower = {each.lower(): each for each in known}
    return [
        by_lower[each] for each in difflib.get_close_matches(word.lower(), by_lower, count, 0.7)
    ]


def did_you_mean(found: Sequence[str]) -> str:
    """The question whether one of some words was meant; empty if there are none."""
    return f"did you mean {' or '.join(map(shlex.quote, found))}?" if found else ""


def choices() -> list[str]:
    """Every `group=option` of robusttrain."""
    return sorted(f"{file.parent.name}={file.stem}" for file in CONF.glob("*/*.yaml"))


def groups() -> list[str]:
    """The names of the groups."""
    return sorted({choice.partition("=")[0] for choice in choices()})


def keys() -> list[str]:
    """The groups, and the keys of a run that belong to no group."""
    config = declared("robusttrain.config.run_config", "Config")
    own = (field.name for field in dataclasses.fields(config) if not field.metadata)
    return sorted({*groups(), *own})


def for_bare(word: str) -> list[str]:
    """What a word without `=` may stand for: an option of some groups, or else a key.

    >>> for_bare("fgsm")
    ['attack=fgsm', 'defense=fgsm']
    >>> for_bare("batch_sise")
    ['batch_size=...']
    """
    options = {choice.partition("=")[2] for choice in choices()}
    option = nearest(word, options) if word not in options else [word]
    found = [choice for choice in choices() if choice.partition("=")[2] in option]
    return found or [f"{key}=..." for key in nearest(word, keys())]


def for_flag(flag: str, words: Sequence[str]) -> list[str]:
    """What a flag such as `--eps 0.1` may stand for, with its value, or with the word after it.

    >>> for_flag("--eps", ["seed=1", "--eps", "0.1"])
    ['eps=0.1']
    >>> for_flag("--batch-size=64", [])
    ['batch_size=64']
    """
    name, equals, value = flag.lstrip("-").partition("=")
    section, dot, rest = name.partition(".")
    following = next((after for word, after in pairwise(words) if word == flag), "...")
    value = value if equals else following
    return [f"{key}{dot}{rest}={value}" for key in nearest(section, keys())]
