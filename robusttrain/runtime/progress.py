"""The interface by which long computations report their progress."""

from collections.abc import Callable
from typing import Protocol

Advance = Callable[[int], object]
"""Called with the number of steps that have been done since the last call."""


class Progress(Protocol):
    """The receiver of progress: a bar of the terminal, or `SILENT`."""

    def advance(self, steps: int = 1) -> object:
        """Report that `steps` more steps are done."""

    def show(self, title: str) -> object:
        """Show `title` as the current work."""


def unreported(steps: int) -> None:
    """Ignore progress; the default of parameters of type `Advance`."""


class _Silent:
    def advance(self, steps: int = 1) -> None:
        """Do nothing."""

    def show(self, title: str) -> None:
        """Do nothing."""


SILENT: Progress = _Silent()
