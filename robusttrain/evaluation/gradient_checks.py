"""Whether input gradients say anything about the outputs."""

from typing import NamedTuple

import torch
from torch import Tensor

from robusttrain.attacks.attack_loss import Label, attack_loss, cross_entropy
from robusttrain.attacks.model_view import QueryCounter, frozen, logits_of
from robusttrain.evaluation.curves import Probe
from robusttrain.evaluation.session import EvaluationSession
from robusttrain.threat import Threat
from robusttrain.threat.balls import ball

# Lengths of the steps along which outputs are predicted, as shares of the radius. Of a smooth
# network a short one is nearly linear; of a quantised one only a long one shows anything.
STEPS = (1, 1 / 4, 1 / 16, 1 / 64)

# How far the change of an output may be from what the gradient says, as a share of that.
TOLERANCE = 0.5


class GradientShares(NamedTuple):
    """Percentages of images whose gradient is zero, non-finite, or predicts no change."""

    zero: float
    non_finite: float
    misleading: float


def gradient_shares(probe: Probe) -> GradientShares:
    """The shares at the images or at a random start near them, whichever is larger.

    What masks gradients at the images may not do so next to them, and the other way round.
    """
    subject, threat = probe.subject, probe.attack.threat
    generator = torch.Generator(subject.x.device).manual_seed(subject.seed)
    start = ball(threat).random_start(subject.x, generator)
    with frozen(subject.model):
        shares = [_shares(subject, threat, x) for x in (subject.x, start)]
    return GradientShares(*(100 * max(share) for share in zip(*shares, strict=True)))


def _shares(subject: EvaluationSession, threat: Threat, x: Tensor) -> tuple[float, float, float]:
    with subject.drawing("gradients"):
        model = QueryCounter(subject.climbed, subject.batch_size)
        loss = attack_loss(model, x, subject.y, label=Label.given, loss=cross_entropy)
        seen = loss.evaluate(x)
    zero = (seen.gradient == 0).flatten(1).all(1) & seen.usable
    rows = zip(*(torch.split(part, subject.batch_size) for part in (x, subject.y)), strict=True)
    misled = torch.cat([_misled(subject, threat, *part) for part in rows])
    return _share(zero), _share(~seen.usable), _share(misled)


def _misled(subject: EvaluationSession, threat: Threat, x: Tensor, y: Tensor) -> Tensor:
    """Images where no step along the gradient changes the outputs as the gradient says, (N,).

    The output is the lead of the strongest other class at `x`, z_j - z_y, and a step leads to the
    maximiser of its linearisation within a share of the radius. Noise is the same in all passes.
    """
    point = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = _logits(subject, point)
        rival = logits.detach().scatter(1, y[:, None], -torch.inf).argmax(1)
        before = _lead(logits, y, rival)
        (gradient,) = torch.autograd.grad(before.sum(), point)
    gradient = gradient.nan_to_num(0, 0, 0)
    predicted = torch.zeros_like(y, dtype=torch.bool)
    for share in STEPS:
        x_new = ball(threat.at(share * threat.eps)).linear_maximiser(gradient, x)
        expected = (gradient * (x_new - x)).flatten(1).sum(1)
        with torch.no_grad():
            change = _lead(_logits(subject, x_new), y, rival) - before
        predicted |= (change - expected).abs() <= TOLERANCE * expected
    return ~predicted & gradient.flatten(1).any(1)


def _logits(subject: EvaluationSession, x: Tensor) -> Tensor:
    with subject.drawing("gradients"):
        return logits_of(subject.climbed, x)


def _share(flags: Tensor) -> float:
    return float(flags.float().mean())


def _lead(logits: Tensor, y: Tensor, rival: Tensor) -> Tensor:
    return (logits.gather(1, rival[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
