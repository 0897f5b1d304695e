"""Handle SIGINT and SIGTERM: save state first, then exit."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Signals that clusters send before they end a job.
NOTICES = (signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(KeyboardInterrupt):
    """The process was told to stop. No `Exception`: nothing but the command line takes it.

    Ray waits on where a signal raises anything else.

    Parameters
    ----------
    signum
        The signal that said so.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class _Signals:
    """Received signals, and whether a caller polls for them."""

    def __init__(self) -> None:
        self.came: int | None = None
        self.deferred = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        again, self.came = self.came is not None, signum
        if again or not self.deferred:
            raise Interrupted(signum)


_signals = _Signals()


@contextmanager
def handle_signals() -> Iterator[None]:
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
def handle_in_worker() -> Iterator[None]:
    """`handle_signals`, in a process that was started for a job and may get another one later.

    Ctrl+C is left to the process that the user has started. Whoever was told to stop stays so: the
    next job raises `Interrupted` at once. Where a cluster listens to a notice, it gets it when the
    job has left its checkpoint.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _signals.came is not None:
        raise Interrupted(_signals.came)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listening = {s: signal.getsignal(s) for s in NOTICES if callable(signal.getsignal(s))}
    for signum in (signal.SIGTERM, *listening):
        signal.signal(signum, _signals.handle)
    _signals.deferred = False
    try:
        yield
    except Interrupted as interrupted:
        told = listening.get(signal.Signals(interrupted.signum))
        if callable(told):
            told(interrupted.signum, None)
        raise
    finally:
        # Between its jobs there is nothing to interrupt.
        _signals.deferred = True


@contextmanager
def deferred() -> Iterator[Callable[[], int | None]]:
    """Within the block the first signal is only told by the function given; a second one raises."""
    before, _signals.deferred = _signals.deferred, True
    try:
        yield lambda: _signals.came
    finally:
        _signals.deferred = before


def pending() -> bool:
    """Whether a signal has asked for an end and somebody looks at it by himself."""
    return _signals.came is not None and _signals.deferred


def raise_pending() -> None:
    """Raise `Interrupted` for a signal that was put off."""
    if _signals.came is not None:
        raise Interrupted(_signals.came)
