"""`resume=`: the command line of a run that was stopped, and who may work in its directory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from robusttrain.errors import InputError

KEY = "resume="
LOCK = ".lock"

# Written last: a run without it has not come to its end.
END = "manifest.json"

# Where the default of hydra.run.dir puts its runs.
RUNS = Path("outputs")


def resumed(arguments: Sequence[str]) -> list[str]:
    """`arguments`, or those of the run that `resume=` in them names.

    Raises
    ------
    InputError
        If there is no such run, or it is finished, or more than `resume=DIR` is asked for.
    """
    chosen = [argument for argument in arguments if argument.startswith(KEY)]
    if not chosen:
        return list(arguments)
    others = [argument for argument in arguments if argument not in chosen]
    value = chosen[-1].removeprefix(KEY)
    folder = _newest(others) if value == "auto" else Path(value)
    if folder is None:
        return others
    if value != "auto" and others:
        raise InputError(
            f"{chosen[-1]} takes everything from that run: {' '.join(others)} is not allowed"
        )
    if not _is_run(folder):
        raise InputError(f"{chosen[-1]} is no directory of a run, with .hydra/overrides.yaml in it")
    if (folder / END).exists():
        raise InputError(f"{chosen[-1]} is finished: there is nothing to go on with")
    return [*_options(folder), *_overrides(folder), f"hydra.run.dir={folder}", f"{KEY}{folder}"]


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the directory of a run; whatever a killed process was writing there is removed.

    Raises
    ------
    InputError
        If another process holds it.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"hydra.run.dir={folder} is in use: another process runs there") from error
    try:
        for half in folder.glob(".*.partial"):
            half.unlink()
        yield
    finally:
        # Before its release, or it might be the lock of somebody else by then.
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def _newest(overrides: Sequence[str]) -> Path | None:
    """The newest unfinished run of the same command, if there is one."""
    found = [path.parent.parent for path in RUNS.glob("**/.hydra/overrides.yaml")]
    runs = [run for run in found if _is_run(run)]
    wanted = sorted(_settings(overrides))
    same = [run for run in runs if not (run / END).exists() and sorted(_overrides(run)) == wanted]
    return max(same, key=lambda run: _overrides_file(run).stat().st_mtime, default=None)


def _is_run(folder: Path) -> bool:
    """Whether Hydra has come to write the command of a run there: its last word, and not empty."""
    path = _overrides_file(folder)
    return path.is_file() and path.stat().st_size > 0


def _overrides(run: Path) -> list[str]:
    given = OmegaConf.to_container(OmegaConf.load(_overrides_file(run)))
    assert isinstance(given, list)
    return _settings([str(override) for override in given])


def _settings(overrides: Sequence[str]) -> list[str]:
    return [override for override in overrides if not override.startswith((KEY, "hydra.", "-"))]


def _overrides_file(run: Path) -> Path:
    return run / ".hydra" / "overrides.yaml"


def _options(run: Path) -> list[str]:
    """The folder of the user's own configuration that the run was given, if any."""
    saved = OmegaConf.load(run / ".hydra" / "hydra.yaml")
    sources = OmegaConf.select(saved, "hydra.runtime.config_sources")
    own = [source.path for source in sources if source.provider == "command-line"]
    return [word for path in own for word in ("--config-dir", str(path))]
