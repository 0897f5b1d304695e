"""Files of the user's configuration that Hydra does not read, since others have the same name."""

from collections.abc import Iterator
from pathlib import Path

from hydra.conf import HydraConf

from robusttrain.errors import InputError


def refuse_hidden(hydra: HydraConf) -> None:
    """Refuse a chosen option of which there are several files: Hydra reads the first one alone.

    Options of robusttrain come first on Hydra's search path, before those of `--config-dir` and
    `hydra.searchpath`.

    Raises
    ------
    InputError
        If there is such an option.
    """
    sources = [source for source in hydra.runtime.config_sources if source.schema == "file"]
    for name in _names(hydra):
        files = [Path(source.path, f"{name}.yaml") for source in sources]
        found = [file for file in files if file.is_file()]
        if len(found) > 1:
            problem = f"is hidden by {found[0]}"
            raise InputError(str(found[1]), allowed="give it another name", problem=problem)


def _names(hydra: HydraConf) -> Iterator[str]:
    """The main file and the chosen options, as `group/option`."""
    if hydra.job.config_name is not None:
        yield hydra.job.config_name
    for group, option in hydra.runtime.choices.items():
        if isinstance(option, str):
            yield f"{group.partition('@')[0]}/{option}"
