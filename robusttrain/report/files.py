"""Files that are written whole or not at all."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from robusttrain.errors import InputError, printable
from robusttrain.run_directory import EVALUATED, MANIFEST, RESULT, RESULTS, TEMPORARY, TRAINED

# How a cell begins that spreadsheets compute.
FORMULA = ("=", "+", "-", "@", "\t")

_BY_STAGE = {"train": (*TRAINED, RESULT), "evaluate": (*EVALUATED, RESULT)}


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
        table = pd.DataFrame(rows).apply(_without_formulas)
        table.to_csv(temporary, index=False, float_format="%.6g")


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
    """Write NumPy arrays by name, compressed."""
    with whole(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


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


def results_in(run_dir: Path) -> list[str]:
    """The names of the result files in the directory of a run, for its manifest."""
    return [name for name in RESULTS if (run_dir / name).is_file()]


def refuse_mixed(run_dir: Path) -> None:
    """Raise `InputError` if a directory has results that are not of the run in its manifest.

    The manifests of earlier versions do not list their files, only the stages of their run. A
    directory without a manifest is not checked.
    """
    path = run_dir / MANIFEST
    if not path.is_file():
        return
    with intact(path):
        manifest = json.loads(path.read_text())
        written = manifest.get("files") or _of_stages(manifest)
        foreign = [name for name in results_in(run_dir) if name not in written]
    if foreign:
        allowed = f"{MANIFEST} is of another run than {', '.join(foreign)}"
        raise InputError(str(run_dir), allowed=allowed, problem="holds results of several runs")


def _of_stages(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    stages = manifest.get("configuration", {}).get("stages")
    return RESULTS if stages is None else sum((_BY_STAGE[stage] for stage in stages), ())
