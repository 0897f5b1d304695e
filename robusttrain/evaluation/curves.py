"""Accuracy over the radius, the steps and, for a random model, the draws of an attack."""

import math
import time
from dataclasses import dataclass, field
from functools import cached_property
from types import EllipsisType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robusttrain.attacks import Attack, ProbeAttack, threat_of
from robusttrain.evaluation.session import VOTES, AttackResult, EvaluationSession, Predictions
from robusttrain.evaluation.worst_points import NearestPoints, WorstPoints
from robusttrain.report.ledger import PROBE, Ledger, Outcome, Point, Row, scattered
from robusttrain.runtime.progress import Advance
from robusttrain.threat import BOX_SIDE, Norm, Threat
from robusttrain.threat.balls import ball

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
    work
        How its searches are named, from which their random numbers follow: those of two probes on
        the same images have to differ.
    searches
        What all searches have found that look no further than `attack`.
    """

    subject: EvaluationSession
    attack: ProbeAttack
    rows: NDArray[np.int64] | EllipsisType = ...
    work: str = "audit"
    searches: "Searches" = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "searches", Searches(self.subject))

    @cached_property
    def nearest(self) -> NearestPoints:
        """The nearest points that searches of any radius have found, in the norm of `attack`."""
        clean = self.searches.clean(VOTES)
        return NearestPoints.of(self.subject, self.attack.threat.norm, clean)

    def broken(
        self,
        attack: Attack,
        name: str,
        *,
        eot: int | None = None,
        draw: str = VOTES,
        among: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.bool_]:
        """Whether each image is misclassified, by itself or under `attack`.

        Only the images `among` which it is to search are attacked, all where not given.
        """
        started = time.perf_counter()
        clean = self.wrong(draw=draw)
        threat, rows = self.attack.threat, np.flatnonzero(~clean if among is None else among)
        found = self.subject.attack(attack, rows, f"{self.work} {name}", threat=threat, eot=eot)
        self.searches.invalid += found.invalid
        seen = self.subject.predict(found.x_adv, draw=draw)
        own = threat_of(attack)
        if draw == VOTES and own is not None and own.norm is threat.norm:
            self.nearest.offer(found.x_adv, seen, own.eps, PROBE)
        if draw == VOTES and own is not None and threat.covers(own):
            self.searches.add(found, seen, time.perf_counter() - started)
        return clean | np.not_equal(seen.prediction, self.searches.points.label)

    def wrong(self, *, draw: str = VOTES) -> NDArray[np.bool_]:
        """Whether each of the images is misclassified by itself."""
        seen = self.searches.clean(draw)
        return np.asarray(np.not_equal(seen.prediction, self.searches.points.label))

    @property
    def found(self) -> NDArray[np.bool_]:
        """Which images are misclassified, by themselves or after one of the searches."""
        return self.searches.points.broken


class Searches:
    """What searches on the same images have found together, and what they cost.

    Parameters
    ----------
    subject
        The model and the images.

    Attributes
    ----------
    invalid
        How many images were returned, by these searches and others, that are no points of their
        threat model.
    """

    def __init__(self, subject: EvaluationSession) -> None:
        self._subject = subject
        self._clean: dict[str, Predictions] = {}
        self._cost = AttackResult(subject.x, 0, 0, 0, 0)
        self._seconds = 0.0
        self.invalid = 0

    @cached_property
    def points(self) -> WorstPoints:
        """The worst point of each image."""
        return WorstPoints.of(self._subject, self.clean(VOTES))

    def clean(self, draw: str) -> Predictions:
        """What the model says of the images, with the noise of `draw`."""
        if draw not in self._clean:
            self._clean[draw] = self._subject.predict(self._subject.x, draw=draw)
        return self._clean[draw]

    def enter(self, ledger: Ledger, name: str, threat: Threat, rows: NDArray[np.int64]) -> None:
        """Let what was found within `threat` count, as the row `name`.

        The images stand at `rows` of the ledger.
        """
        outcome = self._outcome(threat, rows, len(ledger.index))
        ledger.enter(name, outcome, rows, self.points.x_adv.cpu().numpy())

    def add(self, found: AttackResult, seen: Predictions, seconds: float) -> None:
        """Take the points of one more search, where the model says what was `seen`."""
        self.points.offer(found.x_adv, seen)
        counts = (a + b for a, b in zip(self._cost[1:], found[1:], strict=True))
        self._cost = AttackResult(found.x_adv, *counts)
        self._seconds += seconds

    def _outcome(self, threat: Threat, rows: NDArray[np.int64], count: int) -> Outcome:
        points, subject = self.points, self._subject
        size = ball(threat).norm(points.x_adv - subject.x).cpu().numpy()
        wrong = np.not_equal(self.clean(VOTES).prediction, points.label)

        def among_all(values: NDArray[Any]) -> NDArray[Any]:
            return scattered(values, rows, count)

        return Outcome(
            threat=threat,
            broken=among_all(points.broken),
            margin=among_all(points.margin),
            size=among_all(size),
            seconds=self._seconds,
            attacked=among_all(~wrong),
            sampled=among_all(np.ones_like(wrong)),
            forward_passes=self._cost.forward_passes,
            backward_passes=self._cost.backward_passes,
            non_finite=self._cost.non_finite,
            invalid=self._cost.invalid,
            prediction=among_all(points.prediction),
        )


def over_eps(probe: Probe, advance: Advance) -> list[Point]:
    """Accuracy at 0, 1/4, 1/2, 1, 3/2, 2 and 4 times the radius, in linf at 1 at most."""
    threat = probe.attack.threat
    largest = BOX_SIDE if threat.norm is Norm.linf else math.inf
    multiples = [m * threat.eps for m in EPS_MULTIPLES]
    radii = [eps for eps in multiples if eps < largest]
    radii += [largest] if len(radii) < len(multiples) else []
    for _ in multiples[len(radii) :]:
        advance(1)
    attacks = [probe.attack.under(threat.at(eps)) for eps in radii]
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
