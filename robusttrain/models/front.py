"""What stands in front of a network of a library: colour, size and normalisation."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.errors import InputError
from robusttrain.models.normalize import Normalize, check_statistics
from robusttrain.models.resize import Resize

COLOURS = 3


class GreyToColour(nn.Module):
    """Repeat the single channel of images (N, 1, H, W) to (N, 3, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        # No constant of this module, which TorchScript cannot see.
        return x.expand(-1, 3, -1, -1)


def check_both(mean: list[float] | None, std: list[float] | None) -> None:
    """Raise `InputError` unless both statistics are given or neither, or if they are wrong."""
    check_statistics(mean or [], std or [])
    ranges.require(std is None or mean is not None, "std", std, "given together with mean")
    ranges.require(mean is None or std is not None, "mean", mean, "given together with std")


@dataclass
class Front:
    """Fields of an architecture of a library: how images become the input of its network.

    Parameters
    ----------
    name
        The name of the network in the library.
    mean, std
        Normalisation of the images, in pixel units; 1 entry, or one per channel. null: that of the
        library.
    image_size
        The side of the images that the network computes at, in pixels; other images are resized
        inside it, and `eps` stays a radius of the images themselves. null: the images are not
        resized.
    """

    name: str = "resnet18"
    mean: list[float] | None = None
    std: list[float] | None = None
    image_size: int | None = None

    def __post_init__(self) -> None:
        check_statistics(self.mean or [], self.std or [])
        if self.image_size is not None:
            ranges.count(image_size=self.image_size)

    def __str__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r})"

    def behind(
        self,
        network: nn.Module,
        image_shape: tuple[int, int, int],
        channels: int,
        usual: tuple[Sequence[float], Sequence[float]],
    ) -> nn.Sequential:
        """`network` behind the layers that make its input of images with values in [0, 1].

        Parameters
        ----------
        network
            A network for images of `channels` channels.
        image_shape
            The shape (C, H, W) of the images; C is `channels`, or 1 in front of three colours.
        channels
            The number of channels that the network takes.
        usual
            Mean and standard deviation that the library normalises with; a network with another
            number of channels gets the mean of their entries.
        """
        grey = [GreyToColour()] if image_shape[0] != channels else []
        resize = [Resize(self.image_size)] if self.image_size and self._resizes(image_shape) else []
        if self.mean is not None or self.std is not None:
            given = (self.mean, self.std)
            mean, std = (
                _for_channels(values, image_shape[0]) if own is None else own
                for own, values in zip(given, usual, strict=True)
            )
            first = Normalize(mean, std, image_shape[0])
            return nn.Sequential(first, *grey, *resize, network)
        mean, std = (_for_channels(values, channels) for values in usual)
        return nn.Sequential(*grey, *resize, Normalize(mean, std, channels), network)

    def sides(self, image_shape: tuple[int, int, int]) -> tuple[int, int]:
        """Height and width of the images that the network gets."""
        _, height, width = image_shape
        return (self.image_size, self.image_size) if self.image_size else (height, width)

    def _resizes(self, image_shape: tuple[int, int, int]) -> bool:
        return image_shape[1:] != self.sides(image_shape)


def _for_channels(values: Sequence[float], channels: int) -> list[float]:
    # One entry per channel, always: weights of a library have the shapes of a new network.
    per_channel = values if len(values) == channels else [sum(values) / len(values)] * channels
    return [*per_channel]


def not_downloaded(library: str, name: str, error: Exception) -> InputError:
    """The refusal of weights that a library could not download."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    allowed = f"{reason}; without a network, give model.weights=FILE"
    problem = f"of {name} cannot be downloaded by {library}"
    return InputError("weights", "default", allowed, problem)
