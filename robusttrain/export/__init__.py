"""Write a trained network as a file for other programs, and check the file before it counts.

A format is one class with `write` and `opened`: what `opened` returns runs the file as another
program would, so that both can be compared on the same images.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

Runner = Callable[[Tensor], Tensor]
"""Images (N, C, H, W), as the file takes them, to logits (N, num_classes)."""


class Format(Protocol):
    """A kind of file.

    Attributes
    ----------
    suffix
        How its names end.
    holds_code
        Whether it holds the network's computation, and not its weights alone.
    packages
        What has to be installed, beside torch.
    """

    suffix: str
    holds_code: bool
    packages: tuple[str, ...]

    def write(
        self, network: nn.Module, example: Tensor, path: Path, about: Mapping[str, str]
    ) -> None:
        """Write `network`, which is in eval mode, to `path`.

        Parameters
        ----------
        network
            From a batch like `example`, of any size, to logits.
        example
            Images of two or more. torch.export takes a batch of one for a constant.
        about
            The metadata of the file.
        """

    def opened(self, path: Path, network: nn.Module) -> Runner:
        """A function that runs the file; `network` is what was written."""
