"""Errors in code of the user's own: classes and functions that a `_target_` names."""

import sys
import sysconfig
import traceback
from pathlib import Path

from robusttrain.config.error_messages import EXPECTED_ERRORS
from robusttrain.config.folders import PACKAGE

# Below these folders lies code of others: this package, the standard library, what is installed.
FOREIGN = {
    PACKAGE,
    *(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")),
}


def see_current_directory() -> None:
    """Let components lie in the current directory, as `python -m robusttrain` does.

    It comes last, so that a file there never hides a module that robusttrain needs.
    """
    here = str(Path.cwd())
    if not sys.flags.safe_path and not {"", here} & {*sys.path}:
        sys.path.append(here)


def own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames in files of the user's own that lead to an error, or to what caused it.

    None for an error that was raised on purpose, and says itself what is wrong.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, EXPECTED_ERRORS):
        return []
    return [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame)]


def places(error: BaseException) -> str:
    """A line with the places of `own_frames`, the outermost first; empty if there are none."""
    frames = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in own_frames(error)]
    return f"\n({', '.join(frames)})" if frames else ""


def report(error: BaseException) -> str:
    """The type and the text of an error, below its `own_frames`."""
    lines = traceback.format_list(own_frames(error)) + traceback.format_exception_only(error)
    return "".join(lines).rstrip()


def _is_own(frame: traceback.FrameSummary) -> bool:
    file = Path(frame.filename).resolve()
    return file.is_file() and FOREIGN.isdisjoint(file.parents)
