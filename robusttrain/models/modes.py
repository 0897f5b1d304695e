"""The train and eval modes of a model's modules."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Restore the mode of every module of `model` at the end of the block.

    A call of `model.train()` would also change layers that were frozen in eval mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class AlwaysInEval:
    """A base that comes before `nn.Module`: the module stays in eval mode, whatever sets its mode.

    Attacks and trainings set the mode of each module, so that an eval mode alone would not last.
    """

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, False if name == "training" else value)
