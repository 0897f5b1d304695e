"""The directory of a run holds results of one run only."""

import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from robusttrain import renames
from robusttrain.errors import InputError
from robusttrain.run_directory import (
    EVALUATED,
    EVALUATION_CACHE,
    LOCK,
    MANIFEST,
    OF_SWEEP,
    PAGE,
    PLOTS,
    PREAMBLE,
    RECORDS,
    RESULT,
    RESULTS,
    TEMPORARY,
    TENSORBOARD,
)
from robusttrain.runs.lock import refuse_in_use
from robusttrain.runtime import distributed

# What a run or a sweep writes into its directory, and the folders there.
OURS = {*PREAMBLE, *RESULTS, LOCK, MANIFEST, TENSORBOARD, PAGE, PLOTS, *OF_SWEEP}
# What has no part in the results: Hydra's own keys, how much is printed, and whether in a page.
OUTPUT = ("hydra", "verbosity", "report")
NESTED = (".hydra", TENSORBOARD, PLOTS, f"{EVALUATION_CACHE}*")


class RunDirectories(Callback):
    """Refuse a directory with results of another configuration, before Hydra writes to it."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the directory of a run, in the process that writes to it."""
        if not distributed.is_main():
            return
        try:
            run_dir = Path(config.hydra.run.dir)
            refuse_links(run_dir)
            refuse_in_use(run_dir)
            if config.get("resume") is None:
                refuse_other_results(run_dir, config)
        except OmegaConfBaseException:
            # Hydra will raise it again, since it needs the same values.
            return
        except InputError as error:
            _leave(error)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the directories of a sweep that is continued."""
        try:
            records = Path(config.hydra.sweep.dir, RECORDS)
            for folder in (records.parent, records, *_job_folders(records)):
                refuse_links(folder)
        except OmegaConfBaseException:
            # As above.
            return
        except InputError as error:
            _leave(error)


def refuse_links(folder: Path) -> None:
    """Raise `InputError` if a file that a run writes is a symbolic link, which may lead anywhere.

    The folder itself may be one.
    """
    if not folder.is_dir():
        return
    hidden = (path for path in folder.glob(".*") if path.name.endswith(TEMPORARY))
    ours = (path for path in folder.iterdir() if path.name in OURS or folder.name == RECORDS)
    caches = folder.glob(f"{EVALUATION_CACHE}*")
    nested = (path for name in NESTED for path in folder.glob(f"{name}/**/*"))
    for path in (*hidden, *ours, *caches, *nested):
        # A device such as /dev/null keeps nothing.
        if path.is_symlink() and not path.is_char_device():
            problem = f"contains a symbolic link, {path.relative_to(folder)}"
            allowed = "files elsewhere would be written; remove the link"
            raise InputError("directory", folder, allowed, problem)


def _job_folders(records: Path) -> Iterator[Path]:
    return (records.parent / path.stem.replace("%2F", "/") for path in records.glob("*.json"))


def _leave(error: InputError) -> NoReturn:
    # Hydra turns other exceptions into warnings.
    sys.exit(distributed.exit_message(f"robusttrain: {error}"))


def refuse_other_results(run_dir: Path, config: DictConfig) -> None:
    """Raise `InputError` if `run_dir` has results of another configuration than `config`.

    The configuration of these results is the one that Hydra saved there.
    """
    if not any((run_dir / name).exists() for name in (MANIFEST, *RESULTS)):
        return
    before = _saved(run_dir / str(config.hydra.output_subdir) / "config.yaml")
    today = _plain(OmegaConf.create(OmegaConf.to_yaml(without_output(config))))
    keys = [key for key in {**before, **today} if before.get(key) != today.get(key)]
    others = ", ".join(key for key in keys if key not in ("resume", *OUTPUT))
    if others:
        owner = f"another configuration ({others} differ)" if before else "an unknown configuration"
        allowed = "choose another directory, or remove that one"
        raise InputError("hydra.run.dir", run_dir, allowed, f"holds results of {owner}")


def clear(run_dir: Path, *, resumed: bool) -> None:
    """Remove all results of an earlier run of the same configuration.

    Finished pieces of its evaluation stay, since they are used only where they fit. So do the
    results of a training that is resumed. All others are written again.
    """
    for name in (PAGE, MANIFEST, *((*EVALUATED, RESULT) if resumed else RESULTS)):
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / PLOTS, ignore_errors=True)
    if not resumed:
        shutil.rmtree(run_dir / TENSORBOARD, ignore_errors=True)


def remove_if_untouched(directory: Path, preamble: Collection[str]) -> None:
    """Remove a directory that holds `preamble` at most, and parents that hold nothing else."""
    here = Path.cwd()
    for folder in (directory, *directory.parents):
        may_go = here in folder.parents or folder == directory != here
        if not may_go or {path.name for path in folder.iterdir()} - {*preamble}:
            return
        shutil.rmtree(folder)


def _saved(path: Path) -> Mapping[str, Any]:
    """The configuration in a file; empty if there is none that can be read."""
    try:
        return _plain(OmegaConf.create(renames.yaml(path.read_text())))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        return {}


def _plain(config: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", OmegaConf.to_container(config, resolve=False))


def without_output(config: DictConfig) -> DictConfig:
    """The part of a configuration that its results depend on."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key not in OUTPUT])
