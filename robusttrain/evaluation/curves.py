"""Accuracy over the radius, the steps and, for a random model, the draws of an attack."""

from dataclasses import dataclass, field
from types import EllipsisType

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from robusttrain.attacks import Attack, ProbeAttack
from robusttrain.evaluation.session import EvaluationSession
from robusttrain.report.ledger import Point, Row
from robusttrain.runtime.progress import Advance

EPS_MULTIPLES = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 4.0)
STEPS = (1, 2, 5, 10, 20, 40, 80)
DRAWS = (1, 5, 20, 80)


@dataclass(frozen=True)
class Probe:
    """A gradient attack and the images that it is tried on, again and again.

    Parameters
    ----------
    subject
        The model and the images.
    attack
        The attack at the radius and with the steps of the evaluation.
    rows
        Where its images stand among the evaluated ones; all of them, in order, where not given.
    invalid
        How many invalid images each attack has returned so far.
    """

    subject: EvaluationSession
    attack: ProbeAttack
    rows: NDArray[np.int64] | EllipsisType = ...
    invalid: list[int] = field(default_factory=list)

    def broken(
        self, attack: Attack, name: str, *, eot: int | None = None, draw: str = "votes"
    ) -> NDArray[np.bool_]:
        """Whether each image is misclassified, by itself or under `attack`."""
        clean = self.wrong(draw=draw)
        rows = np.flatnonzero(~clean)
        named, threat = f"audit {name}", self.attack.threat
        crafted = self.subject.attack(attack, rows, named, threat=threat, eot=eot)
        self.invalid.append(crafted.invalid)
        return clean | self.wrong(crafted.x_adv, draw)

    def wrong(self, x: Tensor | None = None, draw: str = "votes") -> NDArray[np.bool_]:
        """Whether each of the images, or of `x` in their place, is misclassified."""
        seen = self.subject.predict(self.subject.x if x is None else x, draw=draw)
        return np.asarray(np.not_equal(seen.prediction, self.subject.y.cpu().numpy()))


def over_eps(probe: Probe, advance: Advance) -> list[Point]:
    """Accuracy at 0, 1/4, 1/2, 1, 3/2, 2 and 4 times the radius."""
    threat = probe.attack.threat
    attacks = [probe.attack.under(threat.at(m * threat.eps)) for m in EPS_MULTIPLES]
    return [_point("eps", probe, attack, advance) for attack in attacks]


def over_steps(probe: Probe, advance: Advance) -> list[Point]:
    """Accuracy after 1, 2, 5, 10, 20, 40 and 80 steps."""
    attacks = [probe.attack.with_steps(steps) for steps in STEPS]
    return [_point("steps", probe, attack, advance) for attack in attacks]


def over_draws(probe: Probe, advance: Advance) -> list[Point]:
    """Accuracy under gradients averaged over 1, 5, 20 and 80 draws."""
    return [_point("eot", probe, probe.attack, advance, draws) for draws in DRAWS]


def _point(
    curve: str, probe: Probe, attack: ProbeAttack, advance: Advance, eot: int | None = None
) -> Point:
    draws = (eot or probe.subject.eot) if probe.subject.random else 1
    threat = attack.threat
    name = f"curve {threat.eps} {attack.steps} {attack.step_size} {draws}"
    counted = Row.counted(curve, threat, probe.broken(attack, name, eot=draws))
    advance(1)
    return Point(curve, attack.steps, draws, counted)
