"""Files of a run, which are written whole or not at all."""

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pandas as pd

from robusttrain import renames
from robusttrain.errors import InputError, printable
from robusttrain.run_directory import AUDIT, TEMPORARY

# How a cell begins that spreadsheets compute.
FORMULA = ("=", "+", "-", "@", "\t")

# Columns of text; an empty cell there is an empty text.
TEXT = (
    "dataset", "model", "defense", "train_attack", "noise", "attack", "norm", "audit", "file",
    "broken_by", "by", "status", "proven_by", "undecided_because", "curve", "check", "threshold",
    "verdict",
)  # fmt: skip


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


def read_csv(path: Path, columns: Collection[str] = ()) -> pd.DataFrame:
    """A table that `write_csv` wrote; an empty one with `columns` if there is no file.

    Checks of the audit have the names of today.

    Raises
    ------
    InputError
        If the file is damaged.
    """
    if not path.is_file():
        return pd.DataFrame(columns=[*columns])
    with intact(path):
        names = [str(name) for name in pd.read_csv(path, nrows=0).columns]
        table: pd.DataFrame = pd.read_csv(
            path,
            dtype={name: "str" for name in names if name in TEXT},
            keep_default_na=False,
            na_values={name: [""] for name in names if name not in TEXT},
        )
        flags = [name for name in names if name.endswith("_broken")]
        table = table.astype(dict.fromkeys(flags, "Int64"))
        return table.replace({"check": renames.CHECKS}) if path.name == AUDIT else table


def read_arrays(path: Path) -> Mapping[str, Any] | None:
    """The arrays of a file, each of which is read when it is used; None if there is no file."""
    if not path.is_file():
        return None
    with intact(path):
        arrays: Mapping[str, Any] = np.load(path)
        return arrays


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file; empty if there is no file."""
    if not path.is_file():
        return {}
    with intact(path):
        return dict(json.loads(path.read_text()))
