"""`robusttrain --help` and `--version`, which need neither Hydra nor torch."""

import platform
from collections.abc import Sequence
from importlib import metadata

import yaml

from robusttrain import __version__
from robusttrain.config.folders import CONF

HELP, VERSION = ("--help", "-h"), "--version"


def is_asked(given: Sequence[str]) -> bool:
    """Whether a command line asks for one of them."""
    return not {*HELP, VERSION}.isdisjoint(given)


def answer(given: Sequence[str]) -> None:
    """Print the help, or the versions of what a result depends on."""
    if not set(HELP).isdisjoint(given):
        file = CONF / "hydra" / "help" / "robusttrain.yaml"
        print(yaml.safe_load(file.read_text(encoding="utf-8"))["template"])
    else:
        versions = f"torch {metadata.version('torch')}, Python {platform.python_version()}"
        print(f"robusttrain {__version__}, {versions}")
