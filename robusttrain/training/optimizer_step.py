"""Around a step of the optimiser: clipping, scaling of the learning rate, skipped steps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robusttrain.runtime import distributed


class SkippingStep:
    """The optimiser's step, which is skipped if the loss or the gradient is non-finite.

    With a fused optimiser of torch the decision is made on the device, as torch's gradient scaling
    does. With any other optimiser the host waits for the device at every step. Each step costs a
    copy of the model's buffers.

    Parameters
    ----------
    model
        The module that defenses call.
    optimizer
        The optimiser of its parameters.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self._decides_on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._before: list[Tensor] = []
        if isinstance(optimizer, torch.optim.SGD):
            _start_momentum(optimizer)

    def keep_buffers(self) -> None:
        """Save the buffers to restore if the next step is skipped."""
        self._before = [buffer.clone() for buffer in self.model.buffers()]

    @torch.no_grad()
    def step_if(self, finite: Tensor) -> None:
        """Take the optimiser's step if `finite`, a boolean scalar, is true in all processes.

        Otherwise restore the buffers of the last `keep_buffers`.
        """
        finite = distributed.all_true(finite)
        if self._decides_on_device:
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        if self._decides_on_device or bool(finite):
            self.optimizer.step()
        for buffer, before in zip(self.model.buffers(), self._before, strict=True):
            buffer.copy_(torch.where(finite, buffer, before))


@torch.no_grad()
def clip_gradient(model: nn.Module, largest: float | None) -> Tensor:
    """Clip the l2 norm of the whole gradient to `largest`, if given; returns the norm before it."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if largest is not None:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


@contextmanager
def scaled_lr(optimizer: torch.optim.Optimizer, factor: float) -> Iterator[None]:
    """Multiply the learning rates by `factor` in this block."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor
    try:
        yield
    finally:
        # Some schedules multiply the current rate, which must not be the scaled one.
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def is_finite(model: nn.Module) -> bool:
    """Whether every parameter of `model` is finite. Waits for the device."""
    finite = [parameter.isfinite().all() for parameter in model.parameters()]
    return not finite or bool(torch.stack(finite).all())


def _start_momentum(optimizer: torch.optim.SGD) -> None:
    """Create SGD's momentum buffers now: a skipped first step would leave them uninitialised."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
