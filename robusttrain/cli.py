"""The command line: configuration in, exit code out."""

import os
import sys
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from robusttrain import checkpoint as checkpoints
from robusttrain import config as configs
from robusttrain import experiment
from robusttrain.errors import InputError, NonFiniteLossError
from robusttrain.report.terminal import Terminal

PACKAGE = Path(__file__).parent
# An installed package carries conf/ inside, a checkout beside it.
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())

# Read before `main` sets the variable for its own purpose.
WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"

# What a job writes before it has done anything; alone, it is nothing to keep.
PREAMBLE = {".hydra", "robusttrain.log"}


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(config: DictConfig) -> float | None:
    """One run, in the directory that Hydra has made for it."""
    chosen = HydraConfig.get()
    run_dir = Path(chosen.runtime.output_dir)
    terminal = Terminal()
    names = {key: str(value) for key, value in chosen.runtime.choices.items()}
    try:
        built, origin = _prepared(config, names, list(chosen.overrides.task))
        result = experiment.run(built, origin, run_dir, terminal)
    except InputError as error:
        _remove_if_untouched(run_dir)
        _leave(error)
    except NonFiniteLossError as error:
        _leave(error)
    # The last line, whole whatever the width of the terminal, for people and scripts to copy.
    terminal.say(str(run_dir))
    return result


def main() -> None:
    """Run the command line; exit with 1 and one clear message where the input is at fault."""
    configs.register()
    # Hydra would print a shortened traceback of its own and leave; this has it raise instead.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        job()
    except (HydraException, OmegaConfBaseException, OSError) as error:
        _leave(error)
    except KeyboardInterrupt:
        sys.exit(130)


def _leave(error: Exception) -> NoReturn:
    """Exit with the message of a foreseen error, or with its traceback where that is wanted."""
    if WANTS_TRACEBACK:
        raise error
    sys.exit(f"robusttrain: {_message(error)}")


def _prepared(
    config: DictConfig, names: dict[str, str], overrides: list[str]
) -> tuple[configs.Config, experiment.Origin]:
    """Everything built, and what a checkpoint has to say of the run."""
    OmegaConf.set_struct(config, False)
    if config.checkpoint is not None:
        saved = checkpoints.load(config.checkpoint)
        inherited = configs.compose_again(config, saved, overrides)
        names |= {key: saved.names[key] for key in inherited if key in saved.names}
    config = configs.with_numbers(config)
    plain = cast("dict[str, Any]", OmegaConf.to_container(config, resolve=False, enum_to_str=True))
    return configs.build(config), experiment.Origin(plain, names)


def _remove_if_untouched(run_dir: Path) -> None:
    found = list(run_dir.iterdir())
    if {path.name for path in found} - PREAMBLE:
        return
    for path in [*(run_dir / ".hydra").glob("*"), run_dir / ".hydra", *found, run_dir]:
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


def _message(error: Exception) -> str:
    """At most two lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "\n".join(lines[:2])
