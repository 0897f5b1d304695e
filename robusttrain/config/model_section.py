"""The section `model`: keys that every architecture has, apart from those of its own.

A network of any class, a user's own included, can start with given weights and be normalised. The
keys for that are taken out of the section before the architecture is built.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig
from torch import nn

from robusttrain.checkpoints.initial_weights import InitialWeights
from robusttrain.errors import InputError
from robusttrain.models import Architecture, network_of
from robusttrain.models.front import check_both
from robusttrain.models.normalize import Normalize

OF_WEIGHTS = tuple(field.name for field in dataclasses.fields(InitialWeights))

# An architecture with parameters of these names normalises itself.
STATISTICS = ("mean", "std")

OF_EVERY_MODEL = (*OF_WEIGHTS, *STATISTICS)


@dataclasses.dataclass
class Normalised:
    """An architecture without a normalisation of its own, behind one.

    Parameters
    ----------
    architecture
        The architecture, or a network that is built already.
    mean, std
        Normalisation of the images, in pixel units; 1 entry, or one per channel.
    """

    architecture: Architecture | nn.Module
    mean: list[float]
    std: list[float]

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """The network behind the normalisation."""
        network = network_of(self.architecture, num_classes, image_shape)
        return nn.Sequential(Normalize(self.mean, self.std, image_shape[0]), network)


class Section(NamedTuple):
    """The section of an architecture.

    Parameters
    ----------
    own
        The keys of the architecture alone.
    weights
        Those of `InitialWeights`.
    mean, std
        The normalisation that the architecture gets; None if it has its own, or none.
    """

    own: DictConfig
    weights: dict[str, Any]
    mean: list[float] | None
    std: list[float] | None

    def around(self, architecture: Any) -> Any:
        """The architecture behind its normalisation, if it gets one.

        Raises
        ------
        InputError
            If the normalisation is not allowed.
        """
        try:
            check_both(self.mean, self.std)
        except InputError as error:
            raise error.under("model") from error
        if self.mean is None or self.std is None:
            return architecture
        return Normalised(architecture, self.mean, self.std)


def divided(section: Mapping[str, Any]) -> Section:
    """The keys in the section `model`, by what they belong to."""
    own = cast(DictConfig, copy.deepcopy(section))
    weights = {key: own.pop(key) for key in OF_WEIGHTS if key in own}
    normalises_itself = _takes(str(own.get("_target_")), STATISTICS)
    statistics: dict[str, Any] = {}
    for key in STATISTICS:
        value = section.get(key)
        if value is None:
            own.pop(key, None)
        elif not normalises_itself:
            statistics[key] = [*value] if not isinstance(value, str | int | float) else value
            del own[key]
    return Section(own, weights, statistics.get("mean"), statistics.get("std"))


def _takes(target: str, names: tuple[str, ...]) -> bool:
    """Whether a class or function has a parameter of one of these names."""
    try:
        called: Callable[..., Any] = get_object(target)
        return not set(names).isdisjoint(inspect.signature(called).parameters)
    # Building it reports what is wrong with it.
    except (HydraException, ImportError, AttributeError, ValueError, TypeError):
        return False
