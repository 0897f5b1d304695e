"""A full disk: the message that was to be given, and no error of the log before it."""

import errno
import logging
import os
from pathlib import Path

import pytest

from robusttrain.runtime.log_file import LogFile
from toys.command_line import CommandLine
from toys.runs import assert_refused

# A device without space, of Linux.
FULL = Path("/dev/full")

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")

SMALL = ["dataset=synthetic", "model=linear", "evaluation=quick", "device=cpu", "hydra.run.dir=run"]

# The first result of a run meets a full disk.
NO_SPACE = f"""
from pathlib import Path
def full(self, *arguments, **keys):
    raise OSError({errno.ENOSPC}, {os.strerror(errno.ENOSPC)!r})
Path.write_text = full
"""


@pytest.fixture
def full_log(tmp_path: Path) -> Path:
    """A folder with a run whose log has no space."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "robusttrain.log").symlink_to(FULL)
    return tmp_path


def test_a_line_without_space_is_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    file, record = LogFile(FULL), logging.makeLogRecord({"msg": "said"})
    file.handle(record)
    assert capsys.readouterr().err == ""


def test_another_error_of_a_line_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = LogFile(tmp_path / "log")
    file.handle(logging.makeLogRecord({"msg": "%d", "args": ("text",)}))
    assert "TypeError" in capsys.readouterr().err


def test_the_message_is_the_only_line(command_line: CommandLine, full_log: Path) -> None:
    answer = command_line.run(*SMALL, "eps=-1", cwd=full_log)
    assert_refused(answer, ["eps=-1 is not allowed"])


def test_the_full_disk_is_the_message(command_line: CommandLine, full_log: Path) -> None:
    answer = command_line.run(*SMALL, cwd=full_log, first=NO_SPACE)
    assert_refused(answer, [os.strerror(errno.ENOSPC), "hydra.run.dir"])
