"""The exit codes of `robusttrain`; `docs/reference/commands.md` explains them."""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a command has ended."""

    success = 0
    failure = 1
    usage = 2
    unmet = 3
    interrupted = 130
    terminated = 143


def of_signal(signum: int) -> int:
    """The code of a command that a signal has ended, as shells have it."""
    return 128 + signum
