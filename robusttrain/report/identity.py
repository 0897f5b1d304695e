"""Which files belong to a run: its manifest, which is written last, has the SHA-256 of each."""

import hashlib
import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from robusttrain.errors import IdentityWarning, InputError
from robusttrain.report.files import intact
from robusttrain.run_directory import (
    EVALUATED,
    LATEST,
    MANIFEST,
    PREVIOUS,
    RESULT,
    RESULTS,
    TRAINED,
)

_BY_STAGE = {"train": (*TRAINED, RESULT), "evaluate": (*EVALUATED, RESULT)}


def digests(run_dir: Path, passing: Collection[str] = ()) -> dict[str, str]:
    """The SHA-256 of each result file in the directory of a run, for its manifest.

    Those in `passing` are left out.
    """
    return {name: _digest(run_dir / name) for name in results_in(run_dir) if name not in passing}


def refuse_mixed(run_dir: Path, read: Sequence[str]) -> None:
    """Raise `InputError` if a directory has results that are not of the run in its manifest.

    All result files must be listed there, and those in `read` must have the content that was
    listed. A run that was killed at its very end may have left checkpoints, which count for nothing
    then. The manifests of earlier versions have no digests, which is a warning, and the earliest
    ones only the stages of their run. A directory without a manifest is not checked.
    """
    path = run_dir / MANIFEST
    if not path.is_file():
        return
    with intact(path):
        manifest = json.loads(path.read_text())
        listed = manifest.get("files") or _of_stages(manifest)
        found = results_in(run_dir)
        foreign = [name for name in found if name not in (*listed, LATEST, PREVIOUS)]
        compared = [name for name in read if name in found and name not in foreign]
        if isinstance(listed, Mapping):
            foreign += [name for name in compared if _digest(run_dir / name) != listed[name]]
        elif compared:
            _warn(run_dir)
    if foreign:
        allowed = f"{MANIFEST} is not of {', '.join(foreign)}; restore them, or repeat the run"
        problem = "holds results of several runs, or edited ones"
        raise InputError(str(run_dir), allowed=allowed, problem=problem)


def warn_if_unfinished(run_dir: Path) -> None:
    """Warn of a run without a manifest, whose files nothing identifies."""
    if run_dir.is_dir() and not (run_dir / MANIFEST).is_file():
        line = f"{run_dir} is not finished: it has no {MANIFEST}, which would identify its files"
        warnings.warn(line, IdentityWarning, stacklevel=3)


def _warn(run_dir: Path) -> None:
    line = f"{run_dir} is of an earlier version, whose {MANIFEST} does not identify its files"
    warnings.warn(line, IdentityWarning, stacklevel=3)


def results_in(run_dir: Path) -> list[str]:
    """The names of the result files in the directory of a run."""
    return [name for name in RESULTS if (run_dir / name).is_file()]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_stages(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    stages = manifest.get("configuration", {}).get("stages")
    return RESULTS if stages is None else sum((_BY_STAGE[stage] for stage in stages), ())
