"""What the user typed, as the words that Hydra reads."""

import re
import sys
from collections.abc import Sequence

from robusttrain import renames
from robusttrain.errors import InputError
from robusttrain.runs.resume import resumed
from robusttrain.runtime import distributed


def arguments(given: Sequence[str]) -> list[str]:
    """What Hydra is to read of a command line.

    Raises
    ------
    InputError
        If it cannot be.
    """
    arguments = _renamed([word for a in given for word in unstacked(a)])
    if distributed.size() > 1 and {"-m", "--multirun"} & set(arguments):
        problem = "is not allowed under torchrun, whose processes share one run"
        allowed = "start the jobs one by one, or without torchrun"
        raise InputError("-m", allowed=allowed, problem=problem)
    return _overrides_last(resumed(arguments))


def _renamed(arguments: list[str]) -> list[str]:
    """`arguments` with current keys; prints a line for each key that has a new name."""
    current = [renames.override(argument) for argument in arguments]
    for old, new in zip(arguments, current, strict=True):
        if old != new:
            # Not to stdout, which may be the configuration that `--cfg` prints.
            print(f"warning: {old} is now spelt {new}", file=sys.stderr, flush=True)
    return current


def unstacked(argument: str) -> list[str]:
    """`noise=[a,b]` as the overrides that stack the mechanisms a and b; others as they are."""
    stacked = re.fullmatch(r"noise=\[([\w,\s]*)\]", argument)
    if stacked is None:
        return [argument]
    options = [option.strip() for option in stacked[1].split(",") if option.strip()]
    # One that comes twice gets a number, as every mechanism needs a name of its own.
    names = [
        option if option not in options[:place] else f"{option}_{place}"
        for place, option in enumerate(options)
    ]
    mechanisms = zip(names, options, strict=True)
    return ["noise=stack", *(f"+noise@noise.mechanisms.{name}={o}" for name, o in mechanisms)]


def _overrides_last(arguments: list[str]) -> list[str]:
    """Options and overrides in any order, as a user types them; argparse wants them apart."""
    return sorted(
        arguments, key=lambda a: not a.startswith("-") and ("=" in a or a.startswith("~"))
    )
