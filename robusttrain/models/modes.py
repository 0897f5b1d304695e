"""Train and eval modes that outlast a visit."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Give every module of `model` its own mode back at the end of the block.

    `model.train()` afterwards would also wake layers that somebody has frozen in eval mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
