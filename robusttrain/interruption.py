"""SIGINT and SIGTERM: who is told to stop finishes what would be lost, then leaves."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The process was told to stop. No `Exception`: nothing but the command line takes it.

    Parameters
    ----------
    signum
        The signal that said so.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class _Signals:
    """The signals that came, and whether somebody looks at them by himself."""

    def __init__(self) -> None:
        self.came: int | None = None
        self.deferred = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        again, self.came = self.came is not None, signum
        if again or not self.deferred:
            raise Interrupted(signum)


_signals = _Signals()


@contextmanager
def caught() -> Iterator[None]:
    """Raise `Interrupted` where a signal comes, for the length of the block."""
    # Only the main thread may say how signals are handled, and only it gets them.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _signals.came = None
    before = {signum: signal.signal(signum, _signals.handle) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def deferred() -> Iterator[Callable[[], int | None]]:
    """Within the block the first signal is only told by the function given; a second one raises."""
    _signals.deferred = True
    try:
        yield lambda: _signals.came
    finally:
        _signals.deferred = False
