"""The peak memory of a part of a run."""

import mmap
import sys
from pathlib import Path

import pytest
import torch

from robusttrain.runtime import peak_memory
from robusttrain.runtime.peak_memory import peak_meter

CPU = torch.device("cpu")
MEBIBYTES = 64


def allocate() -> None:
    """Use memory and return it to the system, which the allocator of a process may not do."""
    with mmap.mmap(-1, MEBIBYTES * 2**20) as block:
        block.write(b"x" * (MEBIBYTES * 2**20))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets the peak")
def test_what_was_freed_counts_only_for_the_part_that_used_it() -> None:
    before = peak_meter(CPU)
    allocate()
    used, after = before(), peak_meter(CPU)
    assert used - after() > MEBIBYTES / 2


def test_without_a_reset_it_is_that_of_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peak_memory, "RESET", tmp_path / "missing" / "file")
    allocate()
    first = peak_meter(CPU)()
    assert first > MEBIBYTES
    assert peak_meter(CPU)() >= first
