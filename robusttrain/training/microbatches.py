"""Batches that do not fit into memory: computed in parts, whose gradients are summed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robusttrain.defenses import Objective, Stateful
from robusttrain.errors import InputError
from robusttrain.runtime import distributed


@dataclass
class Microbatch:
    """A part of a batch, of which the gradients are summed with those of the others.

    Parameters
    ----------
    model
        As the defense gets it for these images.
    x, y
        Images (N, C, H, W) and labels (N,).
    share
        Of the images of the whole batch.
    found
        What the defense's `inner` has found, once it has been asked.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    share: float
    found: Any = None


def divided(
    x: Tensor, y: Tensor, most: int | None, model: nn.Module
) -> list[tuple[Tensor, Tensor]]:
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
        problem = f"does not fit into memory, nor does a part of {size}"
        allowed = "take a smaller model, or a device with more memory"
        raise InputError("batch_size", images, allowed, problem)
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


def without_graph(objective: Objective, share: float) -> Objective:
    """Its values alone, with the loss by its share."""
    clean, adversarial = (
        None if rows is None else rows.detach() for rows in (objective.clean, objective.adversarial)
    )
    return Objective(share * objective.loss.detach(), clean, adversarial)


def combined(parts: Sequence[Objective]) -> Objective:
    """The objective of a batch from those of its parts, whose losses are weighted."""
    return Objective(
        torch.stack([part.loss for part in parts]).sum(),
        _rows([part.clean for part in parts]),
        _rows([part.adversarial for part in parts]),
    )


def _rows(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else None


def refuse_parts(images: int, defense: object) -> None:
    """Refuse to cut a batch of `images` where its parts cannot be computed one by one.

    Raises
    ------
    InputError
        If several processes train, or if the defense keeps something from batch to batch.
    """
    reason = None
    if distributed.size() > 1:
        # The others would wait for the gradients of a whole batch.
        reason = "several processes do"
    elif isinstance(defense, Stateful):
        # What it keeps for the places of a batch would be that of one part for all of them.
        reason = "a defense that keeps something from batch to batch does"
    if reason is not None:
        problem = f"does not fit into memory, and {reason} not compute it in parts"
        allowed = f"try batch_size={max(1, images // 2)}"
        raise InputError("batch_size", images, allowed, problem)


def _least(model: nn.Module) -> int:
    return 2 if _normalises(model) else 1


def _normalises(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())
