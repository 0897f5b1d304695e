"""Several threat models in a configuration: which of them `norm` and `eps` stand for."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from robusttrain import ranges
from robusttrain.config.schema import RADII
from robusttrain.config.suggestions import did_you_mean, nearest
from robusttrain.config.unread import destination
from robusttrain.errors import InputError
from robusttrain.threat import Norm, of_radii

KEY = RADII

_IN_BRACES = re.compile(r"(\w+)\s*:")


def with_own_threat(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """A copy in which `norm` and `eps` are one of `threats`; `config` itself without `threats`.

    Parameters
    ----------
    config
        The configuration as Hydra composed it, with what a checkpoint has added, and with numbers
        in place of fractions.
    overrides
        The overrides that the user gave.

    Raises
    ------
    InputError
        If a norm is unknown, or has two radii or none, or if `norm` or `eps` says something else.
    """
    if not config.get(KEY):
        return config
    given_radii = cast("dict[Any, float]", OmegaConf.to_container(config[KEY]))
    # Hydra takes `inf` for a number.
    radii = {str(key): eps for key, eps in given_radii.items()}
    _refuse_unknown(radii)
    of_radii(radii)
    _refuse_two_radii(overrides)
    given = {destination(override) for override in overrides}
    norm = Norm(config.norm)
    if "eps" in given:
        allowed = f"left out: {KEY} has the radius of each norm"
        raise InputError("eps", config.eps, allowed)
    if "norm" in given:
        allowed = f"one of the norms of {KEY}: {', '.join(radii)}"
        ranges.require(norm in radii, "norm", norm, allowed)
    chosen = norm if norm in radii else Norm(next(iter(radii)))
    settled = config.copy()
    settled.norm, settled.eps = chosen, radii[chosen]
    return settled


def _refuse_unknown(radii: Mapping[str, float]) -> None:
    for norm, eps in radii.items():
        meant = did_you_mean(nearest(norm, map(str, Norm)))
        allowed = "; ".join(filter(None, [f"the radius of one of {', '.join(Norm)}", meant]))
        ranges.require(norm in list(Norm), f"{KEY}.{norm}", eps, allowed)


def _refuse_two_radii(overrides: Sequence[str]) -> None:
    """Refuse a norm that the command line gives twice: the last one would count in silence."""
    norms = Counter[str]()
    for override in overrides:
        key, value = destination(override), override.partition("=")[2]
        if key == KEY:
            norms.update(str(norm) for norm in _IN_BRACES.findall(value))
        elif key.startswith(f"{KEY}."):
            norms[key.removeprefix(f"{KEY}.")] += 1
    for norm, times in norms.items():
        ranges.require(times == 1, f"{KEY}.{norm}", f"given {times} times", "given once")
