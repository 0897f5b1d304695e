"""Batches that do not fit into memory: computed in parts, whose gradients are summed."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robusttrain.errors import InputError


def parted(x: Tensor, y: Tensor, most: int | None, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """A batch in parts of about equal size, which is `most` images at most where that is given.

    BatchNorm cannot train on one image: where the model has it, a part may have one more instead.
    """
    count = 1 if most is None else max(1, min(-(-len(y) // most), len(y) // _least(model)))
    return list(zip(x.tensor_split(count), y.tensor_split(count), strict=True))


def halved(images: int, most: int | None, model: nn.Module) -> int:
    """How many images a part may have, once a batch of `images` did not fit in those of `most`.

    Raises
    ------
    InputError
        If those were as small as they can be.
    """
    size = images if most is None else min(images, most)
    if size <= _least(model):
        raise InputError(
            f"batch_size={images} does not fit into memory, nor does a part of {size}: "
            f"take a smaller model, or a device with more memory"
        )
    return (size + 1) // 2


def notice(most: int, model: nn.Module) -> str:
    """What the user is told."""
    text = (
        f"out of memory: batches are computed in parts of {most} at most from now on, and "
        f"their gradients summed up"
    )
    if not _normalises(model):
        return text
    return (
        f"{text}; BatchNorm normalises each part by itself, which is another training than that "
        f"of whole batches"
    )


def _least(model: nn.Module) -> int:
    return 2 if _normalises(model) else 1


def _normalises(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())
