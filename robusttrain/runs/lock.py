"""A lock for the directory of a run, in which one process works at a time."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from robusttrain.errors import InputError
from robusttrain.run_directory import LOCK, TEMPORARY


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock the directory of a run, and remove files that a killed process left half-written.

    Raises
    ------
    InputError
        If another process holds it.
    """
    lock = _acquired(folder)
    try:
        for half in folder.glob(f".*{TEMPORARY}"):
            half.unlink()
        yield
    finally:
        # Removed before its release, after which another process may hold it. If it cannot be
        # removed, no process holds it, and another exception reports the cause.
        with suppress(OSError):
            (folder / LOCK).unlink()
        lock.release()


def refuse_in_use(folder: Path) -> None:
    """Raise `InputError` if another process holds the directory of a run; nothing is written."""
    if (folder / LOCK).exists():
        _acquired(folder).release()


def _acquired(folder: Path) -> FileLock:
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        reason = "another process runs there"
        raise InputError("hydra.run.dir", folder, reason, "is in use") from error
    return lock
