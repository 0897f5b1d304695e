"""The log of a run, which never stops it."""

import logging
import sys


class LogFile(logging.FileHandler):
    """A log file that drops lines for which there is no space.

    The run reports a full disk when it writes its next result, without the traceback that logging
    would print here for each line.
    """

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Drop the line if the system refuses it; report any other error as logging does."""
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)
