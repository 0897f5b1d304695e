"""Files that are written whole or not at all."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pandas as pd

from robusttrain.errors import InputError, printable
from robusttrain.run_directory import TEMPORARY

# How a cell begins that spreadsheets compute.
FORMULA = ("=", "+", "-", "@", "\t")


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
    """Write `rows`, in six significant digits; no spreadsheet takes their text for a formula."""
    with whole(path) as temporary:
        temporary.write_text(csv_text(rows), encoding="utf-8")


def csv_text(rows: Sequence[Mapping[str, Any]] | pd.DataFrame) -> str:
    """What `write_csv` writes."""
    table = pd.DataFrame(rows).apply(_without_formulas)
    return table.to_csv(index=False, float_format="%.6g")


def _without_formulas(column: pd.Series) -> pd.Series:
    return column if pd.api.types.is_numeric_dtype(column) else column.map(_no_formula)


def _no_formula(cell: Any) -> Any:
    """A cell, behind an apostrophe if a spreadsheet would compute it; numbers are harmless."""
    if not isinstance(cell, str):
        return cell
    text = printable(cell)
    return f"'{text}" if text.startswith(FORMULA) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write NumPy arrays by name, compressed, as `numpy.savez_compressed` does.

    That function takes no array of the name `file`.
    """
    with whole(path) as temporary, ZipFile(temporary, "w", ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content`, indented."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n")


@contextmanager
def intact(path: Path) -> Iterator[None]:
    """Raise `InputError` if the block, which reads `path`, does not find what was written there."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(str(path), allowed=reason, problem="is damaged") from error
