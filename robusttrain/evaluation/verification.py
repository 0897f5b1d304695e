"""Robustness that interval bounds prove, beside what attacks leave standing."""

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.evaluation.audit import Audit, graded
from robusttrain.evaluation.subject import Subject
from robusttrain.intervals import Interval
from robusttrain.models.modes import modes_restored
from robusttrain.noise import predicts_randomly
from robusttrain.report.ledger import Ledger, row
from robusttrain.threat import Norm


def verifiable(model: nn.Module, image_shape: tuple[int, int, int], norm: Norm) -> None:
    """Raise `InputError` if bounds say nothing about `model` in `norm`.

    That is, if the norm is not linf, the model draws noise when it predicts, or it does something
    that has no known bounds.
    """
    allowed = "false, as bounds are of balls in linf around images of a model without noise"
    proper = norm == Norm.linf and not predicts_randomly(model)
    ranges.require(proper, "evaluation.verify", True, allowed)
    with modes_restored(model), torch.no_grad():
        model.eval()(Interval.around(torch.zeros(1, *image_shape), 0.0))


@torch.no_grad()
def proven(subject: Subject, eps: float) -> NDArray[np.bool_]:
    """Which images keep their label in the whole ball of linf radius `eps` (pixel units), (N,).

    An image that is not among them need not be vulnerable: the bounds may be too wide.
    """
    parts = (torch.split(part, subject.batch_size) for part in (subject.x, subject.y))
    held = [_proven(subject.model, x, y, eps) for x, y in zip(*parts, strict=True)]
    return np.concatenate(held)


def _proven(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> NDArray[np.bool_]:
    margins = cast(Interval, model(Interval.around(x, eps))).margins(y)
    others = margins.scatter(1, y[:, None], -torch.inf)
    return np.asarray((others.amax(1) < 0).cpu().numpy())


def verified(held: NDArray[np.bool_], ledger: Ledger, eps: float) -> Audit:
    """The row `verified`, and the check that no attack broke what was proven."""
    within = [o.broken for o in ledger.outcomes.values() if o.norm == Norm.linf and o.eps <= eps]
    broken = np.any([ledger.misclassified, *within], axis=0) & held
    check = graded("proven images broken by an attack", int(broken.sum()), 0, 0)
    return Audit([row("verified", Norm.linf, eps, ~held)], [], [check])
