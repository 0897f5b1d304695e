"""Batches that do not fit into memory: split into micro-batches, whose gradients are summed."""

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
    """A part of a batch, whose gradient is added to those of the other parts.

    Parameters
    ----------
    model
        The model that the defense calls for these images.
    x, y
        Images (N, C, H, W) and labels (N,).
    share
        Share of the batch's images that are in this part.
    found
        The result of the defense's `inner`, after its call.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    share: float
    found: Any = None


def split_batch(
    x: Tensor, y: Tensor, size: int | None, model: nn.Module
) -> list[tuple[Tensor, Tensor]]:
    """Split a batch into parts of about equal length, of at most `size` images if that is given.

    BatchNorm cannot train on one image. If the model has it, a part may have `size` + 1 instead.
    """
    count = 1 if size is None else max(1, min(-(-len(y) // size), len(y) // _smallest(model)))
    return list(zip(x.tensor_split(count), y.tensor_split(count), strict=True))


def halved_size(images: int, size: int | None, model: nn.Module) -> int:
    """The next smaller micro-batch for a batch of `images`, after micro-batches of `size` failed.

    Raises
    ------
    InputError
        If these were as small as they can be.
    """
    failed = images if size is None else min(images, size)
    if failed <= _smallest(model):
        problem = f"does not fit into memory, nor does a part of {failed}"
        allowed = "take a smaller model, or a device with more memory"
        raise InputError("batch_size", images, allowed, problem)
    return (failed + 1) // 2


def split_notice(size: int, model: nn.Module) -> str:
    """The line that is printed when batches are split into parts of `size` images."""
    text = (
        f"out of memory: from now on batches are computed in parts of at most {size} images, "
        f"whose gradients are summed"
    )
    if not _has_batch_norm(model):
        return text
    return (
        f"{text}; BatchNorm normalises each part separately, so that training differs from that "
        f"with whole batches"
    )


def detached(objective: Objective, share: float) -> Objective:
    """The values of a part's objective without the graph, with the loss times its share."""
    clean, adversarial = (
        None if rows is None else rows.detach() for rows in (objective.clean, objective.adversarial)
    )
    return Objective(share * objective.loss.detach(), clean, adversarial)


def combined(parts: Sequence[Objective]) -> Objective:
    """The objective of a batch, from those of its parts, whose losses are weighted already."""
    return Objective(
        torch.stack([part.loss for part in parts]).sum(),
        _concatenated([part.clean for part in parts]),
        _concatenated([part.adversarial for part in parts]),
    )


def _concatenated(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else None


def refuse_microbatches(images: int, defense: object) -> None:
    """Raise `InputError` if a batch of `images` cannot be split.

    Raises
    ------
    InputError
        If several processes train, or if the defense keeps a state from batch to batch.
    """
    reason = None
    if distributed.size() > 1:
        # The other processes would wait for the gradients of a whole batch.
        reason = "several processes cannot split it"
    elif isinstance(defense, Stateful):
        # Its state has one entry for each position in the batch, and all parts would share it.
        reason = "a defense that keeps a state from batch to batch cannot split it"
    if reason is not None:
        problem = f"does not fit into memory, and {reason}"
        allowed = f"try batch_size={max(1, images // 2)}"
        raise InputError("batch_size", images, allowed, problem)


def _smallest(model: nn.Module) -> int:
    return 2 if _has_batch_norm(model) else 1


def _has_batch_norm(model: nn.Module) -> bool:
    """Whether some BatchNorm uses statistics of the batch; frozen layers are in eval mode."""
    return any(isinstance(module, _BatchNorm) and module.training for module in model.modules())
