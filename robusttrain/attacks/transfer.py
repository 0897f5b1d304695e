"""Transfer: adversarial images of one model, tried on another (Papernot et al. 2016)."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from robusttrain import seeding
from robusttrain.attacks import Attack, Loss, fitted, frugal
from robusttrain.attacks.attack_loss import cross_entropy
from robusttrain.attacks.images import check_images
from robusttrain.attacks.model_view import frozen
from robusttrain.errors import InputError
from robusttrain.noise.control import drawing_from


@dataclass
class Transfer:
    """`attack`, crafted on `source` instead of the model that is given, which is never asked.

    A model that holds against its own gradients and falls to those of another one hides them
    (Athalye et al. 2018). One more image goes through the source on each call, to see what it takes
    and returns.

    Parameters
    ----------
    source
        The model to craft on, which takes the same images and knows the same classes. It is moved
        to the device of the images.
    attack
        The attack, whose norm and eps are those of the transfer.
    """

    source: nn.Module
    attack: Attack

    def frugal(self) -> Self:
        """The same transfer by a cheap form of its attack."""
        return replace(self, attack=frugal(self.attack))

    def refuse_unfit(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        """Raise `InputError` if the source takes no such images or does not know all classes."""
        image = torch.zeros(1, *image_shape)
        with drawing_from(self.source, 0):
            self._refuse_unknown(self.source.cpu(), image, num_classes - 1)

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        loss: Loss = cross_entropy,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Adversarial images for `x` (N, C, H, W) with labels `y` (N,), crafted on the source.

        Raises
        ------
        InputError
            If `x` is not float32 or float64 in [0, 1], or if the source takes no such images or
            does not know all classes.
        """
        check_images(x)
        generator = generator or seeding.fresh(x.device)
        source = self.source.to(x.device)
        # Seeded here, since the noise of the source is not that of the evaluated model.
        with drawing_from(source, generator.initial_seed()):
            classes = self._refuse_unknown(source, x, int(y.max()))
            attack = fitted(self.attack, classes)
            return attack(source, x, y, loss=loss, generator=generator)

    def _refuse_unknown(self, source: nn.Module, x: Tensor, last: int) -> int:
        """How many classes `source` knows, if it knows the class `last`."""
        classes = _classes(source, x)
        if last >= classes:
            allowed = f"it must know class {last}, too"
            raise InputError("source", allowed=allowed, problem=f"knows {classes} classes")
        return classes


def _classes(source: nn.Module, x: Tensor) -> int:
    """How many logits `source` returns for such images."""
    try:
        with torch.no_grad(), frozen(source):
            return int(source(x[:1]).shape[1])
    except (RuntimeError, ValueError) as error:
        shape = tuple(x.shape[1:])
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        problem = f"cannot take images of shape {shape}"
        raise InputError("source", allowed=reason, problem=problem) from error
