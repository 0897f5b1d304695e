"""Steps of an optimiser, and what becomes of those whose gradient is not finite."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robusttrain.defenses import Objective
from robusttrain.errors import InputError
from robusttrain.noise.layer import noise_layers
from robusttrain.optim.weight_perturbation import Offsets, perturbed
from robusttrain.runtime import distributed
from robusttrain.training import ddp


class Descent:
    """The optimiser of a model in training.

    Whether to skip is decided on the device, in the way of torch's gradient scaling, if the
    optimiser is one of torch's in its fused form. With any other one, and only where `skips`, the
    host waits for the device at every step. `skips` also costs a copy of the model's buffers.

    Parameters
    ----------
    model, optimizer
        The optimiser of the parameters of the model, which is as defenses get it.
    clip
        Largest l2 norm of the whole gradient, if there is one.
    skips
        Leave objectives out whose loss or gradient is not finite.
    repeats
        Refuse objectives that cannot be computed again, though there may be no offsets yet.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip: float | None,
        skips: bool,
        repeats: bool = False,
    ) -> None:
        self.model, self.optimizer, self.clip = model, optimizer, clip
        self.skips, self.repeats = skips, repeats
        self._understands = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._before: list[Tensor] = []
        if skips and isinstance(optimizer, torch.optim.SGD):
            _start_momentum(optimizer)

    def descend(
        self,
        parts: Sequence[tuple[float, Iterator[Objective]]],
        *,
        autocast: Callable[[], AbstractContextManager[Any]],
        penalty: Callable[[], Tensor | None],
        weight: float = 1.0,
        rate_share: float,
        offsets: Offsets | None = None,
    ) -> Iterator[Objective]:
        """Descend the objectives of a batch one by one; yields each after its step.

        Parameters
        ----------
        parts
            The share of the images that each part of the batch has, and its objectives, which are
            means over its images. The gradients of the parts are summed, weighted by their shares;
            no part's graph is kept while another one is computed.
        autocast
            What objectives are computed in.
        penalty
            A scalar that is added to the loss, if there is one.
        weight
            Multiplies the losses, but not the penalty.
        rate_share
            Multiplies the learning rate.
        offsets
            Where the weights are moved for the gradient of the step, if they are; the objective is
            that of the weights themselves.

        Raises
        ------
        InputError
            If an objective cannot be computed again, though it is or will be wanted.
        """
        gradient = partial(self._gradient, autocast, penalty, weight)
        while True:
            self._begin()
            found = gradient([(share, partial(next, own, None)) for share, own in parts])
            if not found:
                return
            repeats = [_again(each) for each in found] if self.repeats or offsets else []
            if offsets is not None:
                with perturbed(self.model, offsets):
                    gradient(zip((share for share, _ in parts), repeats, strict=True))
            whole = _together(found)
            yield whole._replace(loss=self._step(whole.loss, rate_share))

    def _gradient(
        self,
        autocast: Callable[[], AbstractContextManager[Any]],
        penalty: Callable[[], Tensor | None],
        weight: float,
        parts: Iterable[tuple[float, Callable[[], Objective | None]]],
    ) -> list[Objective]:
        """Make the gradient that of all parts; gives them without graphs, none if one is None."""
        found: list[Objective] = []
        for share, compute in parts:
            # Autocast covers what the defense computes up to its next yield, not the step.
            with autocast():
                objective = compute()
            if objective is None:
                return []
            if not found:
                self.optimizer.zero_grad(set_to_none=True)
            extra = penalty()
            loss = weight * objective.loss
            loss = loss if extra is None else loss + extra
            (share * loss).backward()  # type: ignore[no-untyped-call]
            found.append(_without_graph(objective, share))
        ddp.refuse_unused(self.model)
        return found

    def _begin(self) -> None:
        """Keep what a step that is left out has to leave behind."""
        if self.skips:
            self._before = [buffer.clone() for buffer in self.model.buffers()]

    @torch.no_grad()
    def _step(self, loss: Tensor, share: float) -> Tensor:
        """Go a step along the gradients that are there, which are those of `loss`.

        Returns the loss, or NaN where it is finite and the gradient is not. `share` multiplies the
        learning rate for this step.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        usable = loss.isfinite() & norm.isfinite()
        if self.skips:
            usable = distributed.everywhere(usable)
        if self._understands and self.skips:
            self.optimizer.found_inf = (~usable).float()  # type: ignore[attr-defined]
        if self._understands or not self.skips or bool(usable):
            self._step_by(share)
        if self.skips:
            for buffer, before in zip(self.model.buffers(), self._before, strict=True):
                buffer.copy_(torch.where(usable, buffer, before))
        return torch.where(norm.isfinite() | ~loss.isfinite(), loss, torch.nan)

    def _step_by(self, share: float) -> None:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        self.optimizer.step()
        # Schedules that multiply the rate they find must not find this one.
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _without_graph(objective: Objective, share: float) -> Objective:
    """Its values alone, with the loss by its share."""
    clean, adversarial = (
        None if rows is None else rows.detach() for rows in (objective.clean, objective.adversarial)
    )
    return Objective(share * objective.loss.detach(), clean, adversarial, objective.again)


def _again(objective: Objective) -> Callable[[], Objective]:
    if objective.again is None:
        raise InputError(
            "weight_perturbation is not possible with a defense whose objectives cannot be "
            "computed again: give them by robusttrain.defenses.repeatable"
        )
    return objective.again


def _together(parts: Sequence[Objective]) -> Objective:
    """The objective of a batch from those of its parts, whose losses are weighted."""
    return Objective(
        torch.stack([part.loss for part in parts]).sum(),
        _rows([part.clean for part in parts]),
        _rows([part.adversarial for part in parts]),
    )


def _rows(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else None


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
