"""The session of a sweep: state that Hydra's callback, the jobs and the summary share.

Hydra creates the callback from a name in `conf/config.yaml`, and passes nothing but a configuration
to the callback and to the jobs. They share a session instead, which the command line opens around
Hydra. A worker process of a launcher starts without one; the callback, which is sent there with
every job, opens it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from robusttrain.config.error_messages import EXPECTED_ERRORS
from robusttrain.errors import InputError, JobError
from robusttrain.exit_codes import ExitCode
from robusttrain.report.page import Page
from robusttrain.report.verbosity import Verbosity
from robusttrain.runtime import signals

if TYPE_CHECKING:
    from robusttrain.sweeps.pairs import Comparison
    from robusttrain.sweeps.records import Job


@dataclass(frozen=True)
class SweepState:
    """A sweep as it was planned; jobs in other processes get a copy.

    Parameters
    ----------
    cwd
        The directory in which the user started it.
    directory
        The directory for its results.
    planned
        Its jobs; none for a search, whose jobs are not known beforehand.
    keys
        The keys that have several values, or a range.
    engine
        The option of the launcher or of the sweeper, if one of them is not basic.
    maximises
        Whether it is a search that maximises its figure.
    comparison
        Which settings are compared at its end; all if it is None.
    verbosity
        How much it prints.
    page
        Whether it has a page.
    """

    cwd: Path
    directory: Path
    planned: "tuple[Job, ...]" = ()
    keys: tuple[str, ...] = ()
    engine: str = ""
    maximises: bool = False
    comparison: "Comparison | None" = None
    verbosity: Verbosity = Verbosity.normal
    page: Page = Page.none


Unread = Callable[[DictConfig], Mapping[str, InputError]]
"""(configuration of a job, with Hydra's part) -> refusals of settings without effect, by key."""


@dataclass
class Session:
    """The sweep of this process.

    Parameters
    ----------
    sweep
        The sweep, or None before Hydra has announced it, and for a single run.
    in_worker
        Whether this is a worker process of the launcher, which has no terminal.
    unread
        The settings of a job that have no effect; see `Unread`.
    exit_code
        How the command ends if nothing fails.
    view
        The display of jobs in other processes, to be closed when they have ended.
    """

    sweep: SweepState | None = None
    in_worker: bool = False
    unread: Unread | None = None
    exit_code: ExitCode = ExitCode.success
    view: ExitStack = field(default_factory=ExitStack)


_present: ContextVar[Session | None] = ContextVar("present", default=None)


@contextmanager
def opened(unread: Unread) -> Iterator[Session]:
    """Open a session for the block, in which `present` returns it."""
    session = Session(unread=unread)
    before = _present.set(session)
    try:
        yield session
    finally:
        _present.reset(before)


def open_in_worker(sweep: SweepState) -> None:
    """Open the session of a worker process of the launcher, until the process ends."""
    _present.set(Session(sweep, in_worker=True))


def present() -> Session | None:
    """The open session, or None."""
    return _present.get()


@contextmanager
def concluded(unread: Unread, typed: Sequence[str]) -> Iterator[Session]:
    """Summarise the sweep that runs within the block, if there is one.

    Before its jobs, `unread` finds the settings that have no effect in them. `typed` are the words
    of its command.

    Raises
    ------
    JobError
        If the launcher or the sweeper itself fails.
    Interrupted
        If a signal was deferred until the jobs had ended.
    """
    with opened(unread) as session:
        try:
            yield session
        except EXPECTED_ERRORS:
            raise
        except Exception as error:
            if session.sweep is None or not session.sweep.engine:
                raise
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            what = " ".join([session.sweep.engine, "over", *session.sweep.keys])
            raise JobError(f"{what} ended with {type(error).__name__}: {first}") from error
        finally:
            session.view.close()
            if session.sweep is not None:
                session.exit_code = _conclude(session.sweep, typed)
            signals.raise_pending()


def _conclude(sweep: SweepState, typed: Sequence[str]) -> ExitCode:
    # Imported here, since a single run does not need it.
    from robusttrain.sweeps.job import conclude

    return conclude(sweep, typed)
