"""Files that are written whole or not at all."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from robusttrain.run_directory import TEMPORARY


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name once the block has succeeded."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        yield temporary
        # Without this a power cut after the rename can leave the new name with no content.
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]] | pd.DataFrame) -> None:
    """Write `rows`, in six significant digits."""
    with whole(path) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False, float_format="%.6g")


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write NumPy arrays by name, compressed."""
    with whole(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content`, indented."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n")
