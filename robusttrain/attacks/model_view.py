"""A model as an attack sees it: frozen, its passes counted, its batches bounded."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from robusttrain.models.modes import modes_restored
from robusttrain.noise.layer import NoiseLayer


class Mode(StrEnum):
    """The mode of the model's layers while an attack runs."""

    eval = "eval"
    train = "train"


# Their running statistics do not change in a block of `frozen`, and need no copies.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@contextmanager
def frozen(model: nn.Module, mode: Mode = Mode.eval) -> Iterator[None]:
    """Put `model` in `mode` without parameter gradients, and put everything back afterwards.

    Noise layers keep the mode they are in. In train mode BatchNorm normalises with the statistics
    of the batch, as in training, but its running statistics stay as they are, as do all other
    buffers of the model.
    """
    modules = [module for module in model.modules() if not isinstance(module, NoiseLayer)]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tracking = [m for m in modules if isinstance(m, _BatchNorm) and m.track_running_stats]
    with modes_restored(model), buffers_copied(m for m in modules if type(m) not in BATCH_NORMS):
        try:
            for module in modules:
                module.training = mode is Mode.train
            for parameter in parameters:
                parameter.requires_grad_(False)
            for norm in tracking:
                norm.track_running_stats = mode is Mode.eval
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)
            for norm in tracking:
                norm.track_running_stats = True


@contextmanager
def buffers_copied(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let `modules` compute with copies of their buffers, and give them back their own."""
    # Copies instead of values that are written back: autograd refuses to differentiate an earlier
    # pass once a buffer that it saved has been written to.
    own = [
        (m, name, b)
        for m in modules
        for name, b in m.named_buffers(recurse=False, remove_duplicate=False)
    ]
    # Modules may share a buffer.
    copies = {id(buffer): buffer.clone() for _, _, buffer in own}
    try:
        for module, name, buffer in own:
            setattr(module, name, copies[id(buffer)])
        yield
    finally:
        for module, name, buffer in own:
            setattr(module, name, buffer)


def outputs_as_in(model: nn.Module, mode: Mode) -> bool:
    """Whether `model`, held still in `mode`, returns what it returns in the mode that it is in.

    BatchNorm and dropout make the difference; layers of other kinds are taken to have none.
    """
    kinds = _BatchNorm, _DropoutNd
    return all(m.training is (mode is Mode.train) for m in model.modules() if isinstance(m, kinds))


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """The logits (N, K) of `model` for images `x`, in the number format of the images.

    Searches compare values of logits with values of images. What a network computes in another
    format, such as bfloat16 or float64, is converted here and nowhere else.
    """
    logits: Tensor = model(x)
    return logits.to(x.dtype)


def predictions(logits: Tensor) -> Tensor:
    """The class of each row of `logits`, or -1, which is never right, where one is not finite."""
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


class QueryCounter(nn.Module):
    """The view of a model that evaluation gives to attacks: passes are counted, batches are cut.

    Parameters
    ----------
    model
        The model; all but the passes and the batches is its own.
    size
        Most images in one pass, 1 or more.
    draws
        How many passes of the network one call stands for: those that a mean over noise takes.
    random
        Whether outputs are random; a single success then proves nothing.

    Attributes
    ----------
    forward_passes, backward_passes
        Images that went through the network, in each direction.
    non_finite
        How many of them met logits or gradients that are not finite.
    """

    def __init__(
        self, model: nn.Module, size: int, draws: int = 1, *, random: bool = False
    ) -> None:
        super().__init__()
        self.model, self.size, self.draws, self.random = model, size, draws, random
        self.forward_passes = self.backward_passes = 0
        # Where the model is: reading it earlier than at the end would wait for the device.
        self.non_finite: Tensor | int = 0
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K), in passes of `size` images at most."""
        return torch.cat([self._counted(part) for part in torch.split(x, self.size)])

    def _counted(self, x: Tensor) -> Tensor:
        self.forward_passes += self.draws * len(x)
        if x.requires_grad and torch.is_grad_enabled():
            # The hook belongs to this pass alone, whatever else the caller does with its tensor.
            x = x.view_as(x)
            x.register_hook(self._count_backward)  # type: ignore[no-untyped-call]
        logits = logits_of(self.model, x)
        self.non_finite = (~logits.isfinite().all(1)).sum() + self.non_finite
        return logits

    def _count_backward(self, gradient: Tensor) -> None:
        self.backward_passes += self.draws * len(gradient)
        self.non_finite = (~gradient.isfinite().flatten(1).all(1)).sum() + self.non_finite
