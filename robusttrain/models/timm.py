"""The image classifiers of timm (the extra `timm`)."""

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.errors import InputError
from robusttrain.models.front import COLOURS, Front, not_downloaded

# What the other keys are for.
RESERVED = {
    "img_size": "image_size", "in_chans": "in_chans", "num_classes": "the data set",
    "pretrained": "model.weights=default", "checkpoint_path": "model.weights=FILE",
    "drop_path_rate": "drop_path", "drop_rate": "drop", "global_pool": "global_pool",
}  # fmt: skip


@dataclass
class TimmModel(Front):
    """A classifier of timm (`pip install 'robusttrain[timm]'`).

    Images are normalised inside, with the mean and the standard deviation that timm trained the
    network with. A network that takes `img_size`, as transformers do, is built for the size of the
    images, and any other gets them as they are. `model.weights=default` are timm's own weights,
    which timm adapts to the size and the number of channels. Otherwise the network is new.

    Parameters
    ----------
    name
        The name of the network in timm, with or without the tag of its weights, such as
        resnet18 or resnet18.a1_in1k.
    in_chans
        Channels that the network takes: those of the images or, for grey ones, 3, to which they
        are repeated. null: 3 for grey images.
    drop_path, drop
        The rate of stochastic depth, and that of dropout in front of the head, from 0 to below 1.
        null: that of timm.
    global_pool
        How the head pools, such as avg or token. null: as in timm.
    options
        Further arguments of `timm.create_model`, by their names.
    """

    in_chans: int | None = None
    drop_path: float | None = None
    drop: float | None = None
    global_pool: str | None = None
    options: Mapping[str, bool | int | float | str | list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name(self.name)
        if self.in_chans is not None:
            ranges.count(in_chans=self.in_chans)
        for key in ("drop_path", "drop"):
            rate = getattr(self, key)
            allowed = "a number from 0 to below 1"
            ranges.require(rate is None or 0 <= rate < 1, key, rate, allowed)
        for key in self.options:
            if key in RESERVED:
                problem = f"is no option: {RESERVED[key]} sets it"
                raise InputError(f"options.{key}", self.options[key], problem=problem)

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        channels = self._channels(image_shape)
        try:
            network = self._created(image_shape, num_classes=num_classes)
        except TypeError as error:
            raise self._not_taken(error) from error
        return self.behind(network, image_shape, channels, self._usual())

    def usual_size(self) -> int:
        """The side of the images that timm trained the network with."""
        import timm

        settings = timm.get_pretrained_cfg(self.name, allow_unregistered=True)
        return 224 if settings is None else int(settings.input_size[-1])

    def pretrained(self, image_shape: tuple[int, int, int]) -> Mapping[str, Tensor]:
        """The weights of timm, with their normalisation.

        Raises
        ------
        InputError
            If timm has none for the network, or they cannot be downloaded.
        """
        import timm

        if not timm.is_model_pretrained(self.name):
            allowed = "a file, as timm has no weights of this network"
            raise InputError("weights", "default", allowed, f"are not there for {self.name}")
        try:
            network = self._created(image_shape, pretrained=True)
        # A download may end with any error, and so may a file that it has left damaged.
        except Exception as error:
            raise not_downloaded("timm", self.name, error) from error
        return self.behind(
            network, image_shape, self._channels(image_shape), self._usual()
        ).state_dict()

    def _created(self, image_shape: tuple[int, int, int], **more: Any) -> nn.Module:
        import timm

        given = {
            "in_chans": self._channels(image_shape),
            # timm leaves the arguments out that are None.
            "drop_path_rate": self.drop_path, "drop_rate": self.drop,
            "global_pool": self.global_pool, **self.options, **more,
        }  # fmt: skip
        # Its warnings are about names of its own that go out of use.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return _module(
                    timm.create_model(self.name, img_size=self.sides(image_shape), **given)
                )
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
                return _module(timm.create_model(self.name, **given))

    def _channels(self, image_shape: tuple[int, int, int]) -> int:
        own = image_shape[0]
        allowed = f"{own}, as the images have" + (f", or {COLOURS}" if own == 1 else "")
        fits = self.in_chans in (None, own) or (own == 1 and self.in_chans == COLOURS)
        ranges.require(fits, "in_chans", self.in_chans, allowed)
        return self.in_chans or (COLOURS if own == 1 else own)

    def _usual(self) -> tuple[list[float], list[float]]:
        import timm

        settings = timm.get_pretrained_cfg(self.name, allow_unregistered=True)
        # A few networks have no weights, and no normalisation of their own.
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        if settings is None:
            return [*IMAGENET_DEFAULT_MEAN], [*IMAGENET_DEFAULT_STD]
        return [*settings.mean], [*settings.std]

    def _not_taken(self, error: TypeError) -> InputError:
        """The refusal of an argument that the network does not have."""
        for argument in (*RESERVED, *self.options):
            if f"'{argument}'" in str(error):
                key = RESERVED.get(argument, f"options.{argument}")
                value = getattr(self, key, self.options.get(argument))
                return InputError(key, value, str(error), f"cannot be given to {self.name}")
        return InputError("name", self.name, str(error), "cannot be built")


def _module(network: Any) -> nn.Module:
    assert isinstance(network, nn.Module)
    return network


def _check_name(name: str) -> None:
    if find_spec("timm") is None:
        allowed = "pip install 'robusttrain[timm]'"
        raise InputError("name", name, allowed, "needs the extra")
    import timm

    known = timm.list_pretrained() if "." in name else timm.list_models()
    if name not in known:
        close = difflib.get_close_matches(name, known, 3, cutoff=0)
        problem = f"is not a classifier of timm; near it: {', '.join(close)}"
        raise InputError("name", name, problem=problem)
