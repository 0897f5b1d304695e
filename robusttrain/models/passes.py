"""Count the images that go through a network."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Passes:
    """Images that went through a network, in each direction.

    A pass of several draws of noise counts each of them.
    """

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        """Forward and backward passes together."""
        return self.forward + self.backward

    @contextmanager
    def counting(self, network: nn.Module) -> Iterator[None]:
        """Count the passes through `network` in the block, whoever calls it."""

        def count(network: nn.Module, arguments: tuple[Tensor, ...], logits: Tensor) -> None:
            images = len(arguments[0])
            self.forward += images
            if logits.requires_grad:
                logits.register_hook(lambda _: count_back(images))  # type: ignore[no-untyped-call]

        def count_back(images: int) -> None:
            self.backward += images

        with network.register_forward_hook(count):
            yield
