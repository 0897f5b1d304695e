"""Hydra composes each choice of options once in a process, which takes it most of a second.

A command line chooses options, such as `model=mlp`, and sets values, such as `model.widths=[8]`. Of
a choice Hydra looks up, reads and merges about fifty files. `remember` lets it do so once for each
choice, and work with a copy from then on: values are set by Hydra itself, anew each time. A choice
from folders of a user, whose files may change, is always composed anew.
"""

import copy
import functools
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import hydra
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import DefaultsList, Overrides
from omegaconf import DictConfig

from robusttrain.config import schema
from robusttrain.config.folders import CONF

_list_defaults = config_loader_impl.create_defaults_list
_compose = ConfigLoaderImpl._compose_config_from_defaults_list


class _Choice(list[Any]):
    """The files of a choice, in their order, and what they amount to once they are composed."""

    composed: DictConfig | None = None


_known: dict[tuple[object, ...], DefaultsList] = {}


def remember() -> None:
    """Replace the two functions of Hydra that choose files and merge them."""
    config_loader_impl.create_defaults_list = _listed
    ConfigLoaderImpl._compose_config_from_defaults_list = _composed


def learn(words: Iterable[str]) -> None:
    """Compose the options that a command line chooses, for processes that are forked later."""
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    names = ((word, word.lstrip("+~").partition("=")[0].partition("@")[0]) for word in words)
    _learn(*(word for word, name in names if name in groups))


@functools.cache
def _learn(*options: str) -> None:
    schema.register()
    with (
        hydra.initialize_config_dir(str(CONF), version_base="1.3"),
        # The process of the command line finds out what is wrong with it.
        suppress(Exception),
    ):
        hydra.compose("config", list(options))


def _listed(
    repo: Any, config_name: str | None, overrides_list: list[Any], **more: Any
) -> DefaultsList:
    values = Overrides(repo=repo, overrides_list=overrides_list).config_overrides
    options = [override.input_line for override in overrides_list if override not in values]
    key = (config_name, *more.items(), *options)
    folders = {source.path for source in repo.get_sources() if source.scheme() == "file"}
    if folders != {str(CONF)}:
        return _list_defaults(repo, config_name, overrides_list, **more)
    if key not in _known:
        found = _list_defaults(repo, config_name, overrides_list, **more)
        found.defaults = _Choice(found.defaults)
        _known[key] = found
    known = _known[key]
    return DefaultsList(
        defaults=known.defaults, defaults_tree=known.defaults_tree, config_overrides=values,
        overrides=known.overrides,
    )  # fmt: skip


def _composed(self: ConfigLoaderImpl, defaults: Any, repo: Any) -> DictConfig:
    if not isinstance(defaults, _Choice):
        return _compose(self, defaults, repo)
    if defaults.composed is None:
        defaults.composed = _compose(self, defaults, repo)
    return copy.deepcopy(defaults.composed)
