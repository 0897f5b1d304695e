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
    """The process received a signal to stop.

    It is not an `Exception`, so that only the command line handles it. It is a `KeyboardInterrupt`,
    since Ray would keep waiting after any other error in a signal handler.

    Parameters
    ----------
    signum
        The signal that was received.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class _Signals:
    """The last received signal, and whether a caller polls for it."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.deferred = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        again, self.received = self.received is not None, signum
        if again or not self.deferred:
            raise Interrupted(signum)


_signals = _Signals()


@contextmanager
def handle_signals() -> Iterator[None]:
    """Raise `Interrupted` when a signal arrives during the block."""
    # Only the main thread may set handlers, and only it receives signals.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _signals.received = None
    before = {signum: signal.signal(signum, _signals.handle) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def ignore() -> None:
    """Ignore `SIGNALS` from now on, in a process that is about to say why it exits."""
    if threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)


@contextmanager
def handle_in_worker() -> Iterator[None]:
    """`handle_signals` for a worker process, which may run several jobs one after the other.

    Ctrl+C is left to the main process. After a signal, the next job raises `Interrupted` at once.
    If the cluster software has a handler for one of `NOTICES`, that handler is called after the job
    has written its checkpoint.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _signals.received is not None:
        raise Interrupted(_signals.received)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    handlers = {s: signal.getsignal(s) for s in NOTICES if callable(signal.getsignal(s))}
    for signum in (signal.SIGTERM, *handlers):
        signal.signal(signum, _signals.handle)
    _signals.deferred = False
    try:
        yield
    except Interrupted as interrupted:
        handler = handlers.get(signal.Signals(interrupted.signum))
        if callable(handler):
            handler(interrupted.signum, None)
        raise
    finally:
        # Between jobs there is nothing to interrupt.
        _signals.deferred = True


@contextmanager
def deferred() -> Iterator[Callable[[], int | None]]:
    """Defer the first signal of the block; a second one raises `Interrupted`.

    Yields a function that returns the number of the received signal, or None.
    """
    before, _signals.deferred = _signals.deferred, True
    try:
        yield lambda: _signals.received
    finally:
        _signals.deferred = before


def pending() -> bool:
    """Whether a signal was received and deferred."""
    return _signals.received is not None and _signals.deferred


def received() -> bool:
    """Whether a signal was received, deferred or not."""
    return _signals.received is not None


def raise_pending() -> None:
    """Raise `Interrupted` if a signal was deferred."""
    if _signals.received is not None:
        raise Interrupted(_signals.received)
