"""Around a step of the optimiser: what is clipped, scaled or left out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robusttrain.noise.layer import noise_layers
from robusttrain.runtime import distributed


class SkippingStep:
    """The optimiser's step, left out where the loss or the gradient is not finite.

    Whether to skip is decided on the device, in the way of torch's gradient scaling, if the
    optimiser is one of torch's in its fused form. With any other one the host waits for the device
    at every step. Each step costs a copy of the model's buffers.

    Parameters
    ----------
    model, optimizer
        The optimiser of the parameters of the model, which is as defenses get it.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self._decides_on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._before: list[Tensor] = []
        if isinstance(optimizer, torch.optim.SGD):
            _start_momentum(optimizer)

    def keep_buffers(self) -> None:
        """Keep what a step that is left out has to leave behind."""
        self._before = [buffer.clone() for buffer in self.model.buffers()]

    @torch.no_grad()
    def step_if(self, finite: Tensor) -> None:
        """The optimiser's step, if `finite`, a scalar, is true in all processes.

        If not, the buffers are what they were when they were kept.
        """
        finite = distributed.all_true(finite)
        if self._decides_on_device:
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        if self._decides_on_device or bool(finite):
            self.optimizer.step()
        for buffer, before in zip(self.model.buffers(), self._before, strict=True):
            buffer.copy_(torch.where(finite, buffer, before))


@torch.no_grad()
def clipped(model: nn.Module, largest: float | None) -> Tensor:
    """The l2 norm of the whole gradient, a scalar, which is then cut to `largest` if given."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if largest is not None:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


@contextmanager
def scaled_rate(optimizer: torch.optim.Optimizer, share: float) -> Iterator[None]:
    """Multiply the learning rates by `share` in this block."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * share
    try:
        yield
    finally:
        # Schedules that multiply the rate they find must not find this one.
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def is_finite(model: nn.Module) -> bool:
    """Whether every parameter is. Waits for the device."""
    finite = [parameter.isfinite().all() for parameter in model.parameters()]
    return not finite or bool(torch.stack(finite).all())


def groups(model: nn.Module) -> list[dict[str, object]]:
    """Parameter groups: weight decay would silence noise whose size is learnt."""
    of_noise = {id(p) for layer in noise_layers(model) for p in layer.parameters()}
    own = [p for p in model.parameters() if id(p) not in of_noise]
    learnt = [p for p in model.parameters() if id(p) in of_noise]
    found: list[dict[str, object]] = [{"params": own}]
    return [*found, {"params": learnt, "weight_decay": 0.0}] if learnt else found


def _start_momentum(optimizer: torch.optim.SGD) -> None:
    """Give SGD its momentum at once: a first step left out would leave it as unwritten memory."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
