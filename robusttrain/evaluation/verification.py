"""Robustness that interval bounds prove, beside what attacks leave standing."""

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robusttrain.bounds.intervals import Interval
from robusttrain.evaluation.findings import Audit, graded
from robusttrain.evaluation.session import EvaluationSession
from robusttrain.report.ledger import Ledger, Row
from robusttrain.threat import Threat


@torch.no_grad()
def proven(subject: EvaluationSession, eps: float) -> NDArray[np.bool_]:
    """Which images keep their label in the whole ball of linf radius `eps` (pixel units), (N,).

    An image that is not among them need not be vulnerable: the bounds may be too wide. They hold up
    to rounding in the type of the images. Of a model that draws noise, declared or not, nothing is
    proven: bounds are of one draw.
    """
    if subject.random:
        return np.zeros(len(subject.y), dtype=np.bool_)
    parts = (torch.split(part, subject.batch_size) for part in (subject.x, subject.y))
    # What TF32 rounds off may be more than a proof has to spare.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        held = [_proven(subject.model, x, y, eps) for x, y in zip(*parts, strict=True)]
    return np.concatenate(held)


def _proven(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> NDArray[np.bool_]:
    margins = cast(Interval, model(Interval.around(x, eps))).margins(y)
    others = margins.scatter(1, y[:, None], -torch.inf)
    return np.asarray((others.amax(1) < 0).cpu().numpy())


def verified(held: NDArray[np.bool_], ledger: Ledger, threat: Threat) -> Audit:
    """The row `verified`, and the check that no attack broke what was proven."""
    within = [o.broken for o in ledger.outcomes.values() if threat.covers(o.threat)]
    broken = np.any([ledger.misclassified, *within], axis=0) & held
    check = graded("proven images broken by an attack", int(broken.sum()), 0, 0)
    return Audit([Row.counted("verified", threat, ~held)], [], [check])
