"""What this process knows of its sweep, from Hydra's callback to the jobs and the summary.

Hydra makes the callback by itself, from a name in `conf/config.yaml`, and calls it, and the jobs,
with a configuration alone. Nothing can be handed from one to the other, or to whoever has called
Hydra, so they meet here: in the session that is opened around Hydra. A launcher may run jobs in
other processes, where nobody has opened one; the callback goes with every job, and does it there.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from robusttrain.sweeps.records import Job


@dataclass(frozen=True)
class SweepState:
    """A sweep as it was planned; jobs in other processes get a copy.

    Parameters
    ----------
    cwd
        The folder that the user has started it in.
    directory
        Where it leaves its results.
    planned
        Its jobs; none where only the sweeper knows what comes next.
    keys
        Those that were given more than one value, or a range.
    engine
        The option that runs the jobs or chooses them, where it is none of Hydra's plain ones.
    maximises
        Whether it is a search for the largest figure.
    """

    cwd: Path
    directory: Path
    planned: tuple[Job, ...] = ()
    keys: tuple[str, ...] = ()
    engine: str = ""
    maximises: bool = False


@dataclass
class Session:
    """The sweep of this process.

    Parameters
    ----------
    sweep
        None before Hydra has announced one; a single run never has one.
    elsewhere
        Whether this is a process of the launcher, which has no terminal of its own.
    view
        What shows the jobs of other processes as long as they run.
    """

    sweep: SweepState | None = None
    elsewhere: bool = False
    view: ExitStack = field(default_factory=ExitStack)


_present: ContextVar[Session | None] = ContextVar("present", default=None)


@contextmanager
def opened() -> Iterator[Session]:
    """A session for the length of the block, which `present` gives there."""
    session = Session()
    before = _present.set(session)
    try:
        yield session
    finally:
        _present.reset(before)


def open_elsewhere(sweep: SweepState) -> None:
    """Open the session of a process of the launcher, for as long as the process lasts."""
    _present.set(Session(sweep, elsewhere=True))


def present() -> Session | None:
    """The session that is open here."""
    return _present.get()
