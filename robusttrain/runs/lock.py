"""One process at a time in the directory of a run."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from robusttrain.errors import InputError
from robusttrain.run_directory import LOCK, TEMPORARY


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the directory of a run; whatever a killed process was writing there is removed.

    Raises
    ------
    InputError
        If another process holds it.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        reason = "another process runs there"
        raise InputError("hydra.run.dir", folder, reason, "is in use") from error
    try:
        for half in folder.glob(f".*{TEMPORARY}"):
            half.unlink()
        yield
    finally:
        # Before its release, or it might be the lock of somebody else by then. Where it cannot be
        # removed, nobody holds it, and what has gone wrong there is said by another exception.
        with suppress(OSError):
            (folder / LOCK).unlink()
        lock.release()
