"""`resume=`: save the command line of a run, and restore that of an interrupted one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from hydra.conf import HydraConf
from omegaconf import ListConfig, OmegaConf

from robusttrain import renames
from robusttrain.checkpoints.external import CODE
from robusttrain.errors import InputError
from robusttrain.report.files import intact, write_json
from robusttrain.run_directory import COMMAND, MANIFEST
from robusttrain.runs.trust import trust_in, trusted_words

KEY, PLACE, TRUST = "resume=", "hydra.run.dir=", "trust="
PLACES = (
    KEY, PLACE, "hydra.sweep", "hydra/sweeper", "hydra.mode=", "hydra.launcher", "hydra/launcher",
    "hydra.callbacks.sweeps",
)  # fmt: skip

CONSENT = f"{TRUST}[{CODE}]"

# The default of hydra.run.dir lies below this directory.
RUNS = Path("outputs")


@dataclass(frozen=True)
class Command:
    """The command line of a run, as it is saved in the run's directory.

    Parameters
    ----------
    words
        The arguments that start the same run from any directory.
    typed
        The arguments that the user typed, without those that choose the run's directory.
    """

    words: list[str]
    typed: list[str]

    @classmethod
    def of(cls, hydra: HydraConf, arguments: Sequence[str]) -> "Command":
        """The command of the current run; `arguments` are those of the process."""
        sources = hydra.runtime.config_sources
        options = [f"--config-dir={s.path}" for s in sources if s.provider == "command-line"]
        if hydra.job.config_name is not None:
            options.append(f"--config-name={hydra.job.config_name}")
        chosen = [*as_given(hydra.overrides.hydra), *as_given(hydra.overrides.task)]
        return cls([*options, *_settings(chosen)], _settings(arguments))

    @classmethod
    def read(cls, run: Path) -> "Command":
        """The command of the run in `run`, with current keys.

        Raises
        ------
        InputError
            If its file is damaged.
        """
        path = run / COMMAND
        with intact(path):
            stored = json.loads(path.read_text())
            return cls(**{name: list(map(renames.override, w)) for name, w in stored.items()})

    @property
    def trust(self) -> list[str]:
        """The word without which the command would not be resumed as it is."""
        own = [word for word in self.words if word.startswith(TRUST)]
        try:
            trusted_words(self.words, [], COMMAND)
        except InputError:
            return [CONSENT]
        return own

    def write(self, run: Path) -> None:
        """Save it in the directory of the run."""
        write_json(run / COMMAND, vars(self))


def resumed(arguments: Sequence[str]) -> list[str]:
    """`arguments`, or those of the run that their `resume=` names.

    Raises
    ------
    InputError
        If there is no such run, if it is finished, if its command needs trust that is not given, or
        if other arguments than `trust` come with `resume=DIR`.
    """
    chosen = [argument for argument in arguments if argument.startswith(KEY)]
    if not chosen:
        return list(arguments)
    others = [argument for argument in arguments if argument not in chosen]
    value = chosen[-1].removeprefix(KEY)
    if value == "auto":
        newest = _newest(others)
        # What the user types is the same command, and needs no trust.
        typed = [a for a in others if not a.startswith(PLACE)]
        return others if newest is None else [*typed, *_places(newest)]
    folder = Path(value)
    surplus = [argument for argument in others if not argument.startswith(TRUST)]
    if surplus:
        problem = "takes the whole command from that run"
        raise InputError(chosen[-1], allowed=f"remove {' '.join(surplus)}", problem=problem)
    if not (folder / COMMAND).is_file():
        reason, problem = f"it has no {COMMAND}", "is not the directory of a run"
        raise InputError(chosen[-1], allowed=reason, problem=problem)
    if (folder / MANIFEST).exists():
        raise InputError(chosen[-1], allowed="there is nothing to resume", problem="is finished")
    trust = [name for argument in others for name in trust_in(argument)]
    words = trusted_words(Command.read(folder).words, trust, f"{folder / COMMAND}")
    return [*words, *_places(folder)]


def _places(folder: Path) -> list[str]:
    return [f"{PLACE}{quoted(folder)}", f"{KEY}{quoted(folder)}"]


def as_given(overrides: Sequence[str]) -> list[str]:
    """Hydra's list of overrides, in which iteration would replace references by their values."""
    return cast("list[str]", OmegaConf.to_container(cast(ListConfig, overrides), resolve=False))


def quoted(value: Path | str) -> str:
    """A path or a text as the value of an override, whatever characters it contains."""
    text = str(value).replace('"', '\\"').replace("${", "\\${")
    return f'"{text}"'


def _newest(arguments: Sequence[str]) -> Path | None:
    """The newest unfinished run of the same command, in `hydra.run.dir` if that is given."""
    places = [argument.removeprefix(PLACE) for argument in arguments if argument.startswith(PLACE)]
    found = [Path(places[-1], COMMAND)] if places else RUNS.glob(f"**/{COMMAND}")
    runs = [path.parent for path in found if path.is_file()]
    wanted = sorted(_settings(arguments))
    same = [run for run in runs if not (run / MANIFEST).exists() and _typed(run) == wanted]
    return max(same, key=lambda run: (run / COMMAND).stat().st_mtime, default=None)


def _typed(run: Path) -> list[str]:
    """The arguments of a run; none if its file is damaged, which is no reason to refuse others."""
    try:
        return sorted(Command.read(run).typed)
    except InputError:
        return []


def _settings(arguments: Sequence[str]) -> list[str]:
    """The arguments, without those that choose directories or make a sweep."""
    return [a for a in arguments if not a.lstrip("+~").startswith(PLACES)]
