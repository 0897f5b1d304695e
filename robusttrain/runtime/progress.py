"""Progress of long work, for whoever wants to show it."""

from collections.abc import Callable
from typing import Protocol

Advance = Callable[[int], object]
"""Called with the number of steps that have been done since the last call."""


class Progress(Protocol):
    """What long work reports to: a bar of the terminal, or `SILENT`."""

    def advance(self, steps: int = 1) -> object:
        """`steps` more are done."""

    def show(self, title: str) -> object:
        """The work that is done now."""


def unreported(steps: int) -> None:
    """Progress that is shown nowhere."""


class _Silent:
    def advance(self, steps: int = 1) -> None:
        """Nothing."""

    def show(self, title: str) -> None:
        """Nothing."""


SILENT: Progress = _Silent()
