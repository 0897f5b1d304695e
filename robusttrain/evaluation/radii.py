"""The radius of every image: the largest that bounds prove, and the smallest that breaks it."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from robusttrain.attacks import Attack, fitted, states_threat, threat_of, traits_of, under
from robusttrain.bounds import linear
from robusttrain.bounds.graph import Graph
from robusttrain.bounds.intervals import Interval, refuse_unbounded
from robusttrain.errors import InputError
from robusttrain.evaluation.curves import Probe
from robusttrain.evaluation.findings import Audit, Check, graded
from robusttrain.evaluation.session import AttackResult, EvaluationSession
from robusttrain.evaluation.settings import Radii
from robusttrain.evaluation.worst_points import NearestPoints
from robusttrain.report.ledger import CLEAN, RADII, Ledger, Outcome, Point, Row
from robusttrain.runtime.progress import Advance, unreported
from robusttrain.threat import BOX_SIDE, INNERMOST_FIRST, Norm, Threat, named

# The curve of what bounds prove.
PROVEN = "proven"

# Of a network with more values, hidden layers have the bounds of intervals: linear ones take a pass
# for each value.
REFINED = 10_000

Sizes = NDArray[np.float64]


@dataclass(frozen=True)
class ImageRadii:
    """The bracket of the radius of each image in one norm, in pixel units.

    Parameters
    ----------
    threat
        The threat model of the run in this norm.
    levels
        The radii that were searched and proven, in increasing order.
    upper
        The size of the smallest perturbation that broke each image, (N,): 0 of one that is
        misclassified by itself, inf where nothing up to the last level did.
    by
        What found it: `clean`, an attack or `probe`; empty where nothing did.
    lower
        The largest level within which bounds prove each image, or 0, (N,); None if there are no
        bounds for the model in this norm.
    """

    threat: Threat
    levels: Sequence[float]
    upper: Sizes
    by: NDArray[np.str_]
    lower: Sizes | None

    @property
    def largest(self) -> float:
        """How far was searched."""
        return self.levels[-1]

    @property
    def curve(self) -> list[Point]:
        """The accuracy over the radius by what was found, and by what is proven."""
        points = [self._point(RADII, eps, self.upper <= eps) for eps in (0.0, *self.levels)]
        if self.lower is not None:
            points += [self._point(PROVEN, eps, self.lower < eps) for eps in self.levels]
        return points

    @property
    def checks(self) -> list[Check]:
        """Whether nothing broke an image within the radius that is proven for it."""
        if self.lower is None:
            return []
        contradictions = int((self.lower > self.upper).sum())
        check = graded("radii broken below a proven one", contradictions, 0, 0)
        return [check._replace(threat=self.threat)]

    @property
    def audit(self) -> Audit:
        """What they add to the files of an evaluation."""
        return Audit([], self.curve, self.checks)

    def _point(self, name: str, eps: float, broken: NDArray[np.bool_]) -> Point:
        return Point(name, None, None, Row.counted(name, self.threat.at(eps), broken))


def levels_of(settings: Radii, threat: Threat) -> list[float]:
    """The radii at which a suite searches and bounds prove, in increasing order.

    They are multiples of eps / resolution, up to the largest one, which in linf is at most the side
    of the box.
    """
    cap = settings.largest * threat.eps
    cap = min(cap, BOX_SIDE) if threat.norm is Norm.linf else cap
    count = math.floor(settings.largest * settings.resolution)
    # eps itself comes out exactly.
    radii = [threat.eps * (k / settings.resolution) for k in range(1, count + 1)]
    return [*(radius for radius in radii if radius < cap), cap]


def search(
    subject: EvaluationSession,
    threats: Sequence[Threat],
    suite: Mapping[str, Attack],
    settings: Radii,
    ledger: Ledger,
    probes: Sequence[Probe] = (),
    advance: Advance = unreported,
) -> list[ImageRadii]:
    """The radius of each image of `subject` in the norm of each of `threats`.

    What is found within a threat model enters the ledger as a row `radii`, so that its worst case
    is the share of images with a larger radius than its eps.

    Parameters
    ----------
    subject, threats, suite, ledger
        The evaluation: its images, its threat models of different norms, its attacks, and what they
        did. Attacks of one of `threats` are run at other radii, too.
    settings
        How far and how finely is searched.
    probes
        The probes of an audit, after it.
    advance
        Called after each of the `pieces_of` the searches.
    """
    found = {}
    # What is found in an inner ball counts in the worst case of an outer one.
    for threat in sorted(threats, key=lambda threat: INNERMOST_FIRST.index(threat.norm)):
        own = {
            name: attack
            for name, attack in suite.items()
            if states_threat(attack) and threat_of(attack) == threat
        }
        descent = _Descent(subject, threat, own, settings, ledger, advance)
        descent.take(probes)
        descent.run()
        descent.enter(named(RADII, threat, len(threats)))
        found[threat] = descent.result()
    return [found[threat] for threat in threats]


def pieces_of(settings: Radii, threats: Sequence[Threat]) -> int:
    """How many pieces of work the progress bar counts."""
    each = (len(levels_of(settings, threat)) + len(settings.attacks) for threat in threats)
    return sum(each)


@dataclass
class _Descent:
    """The search in one norm: the nearest points so far, and the sizes that the ledger knows."""

    subject: EvaluationSession
    threat: Threat
    suite: Mapping[str, Attack]
    settings: Radii
    ledger: Ledger
    advance: Advance
    levels: list[float] = field(init=False)
    points: NearestPoints = field(init=False)
    cost: AttackResult = field(init=False)

    def __post_init__(self) -> None:
        subject, self._started = self.subject, time.perf_counter()
        self.levels = levels_of(self.settings, self.threat)
        clean = subject.predict(subject.x)
        self.points = NearestPoints.of(subject, self.threat.norm, clean)
        self.cost = AttackResult(subject.x, 0, 0, 0, 0)
        self._known, self._by = _sizes_in(self.ledger, self.threat)

    @property
    def upper(self) -> Sizes:
        """The smallest size that broke each image so far."""
        return np.minimum(self._known, self.points.size)

    def take(self, probes: Sequence[Probe]) -> None:
        """Take what the searches of an audit in this norm have found."""
        for probe in probes:
            if probe.attack.threat.norm is self.threat.norm:
                rows = np.arange(len(self.points.size))[probe.rows]
                self.points.merge(probe.nearest, rows)

    def run(self) -> None:
        """Search for small perturbations, then by the suite from the largest level down."""
        farthest = self.threat.at(self.levels[-1])
        right = np.flatnonzero(self.upper > 0)
        for name, attack in self.settings.attacks.items():
            if not (self.subject.random and traits_of(attack).walks_boundary):
                there = fitted(under(attack, farthest), self.subject.num_classes)
                self._search("minimum", name, there, right)
            self.advance(1)
        resisted = np.zeros(len(self.points.size), dtype=np.bool_)
        for level in reversed(self.levels):
            # At eps itself the suite of the evaluation has searched.
            if level <= self.threat.eps:
                resisted |= self.upper > self.threat.eps
            for name, attack in self.suite.items():
                left = np.flatnonzero((self.upper > level) & ~resisted)
                self._search("level", name, under(attack, self.threat.at(level)), left)
            resisted |= self.upper > level
            self.advance(1)

    def enter(self, name: str) -> None:
        """Let what was found within the threat model count in the ledger."""
        points, ledger = self.points, self.ledger
        inside = points.size <= self.threat.eps
        outcome = Outcome(
            threat=self.threat,
            broken=inside,
            margin=np.where(inside, points.margin, ledger.margin),
            size=np.where(inside, points.size, 0.0),
            seconds=time.perf_counter() - self._started,
            attacked=~ledger.misclassified,
            forward_passes=self.cost.forward_passes,
            backward_passes=self.cost.backward_passes,
            non_finite=self.cost.non_finite,
            invalid=self.cost.invalid,
            prediction=np.where(inside, points.prediction, ledger.prediction),
        )
        ledger.enter(name, outcome, np.arange(len(inside)), points.x_adv.cpu().numpy())

    def result(self) -> ImageRadii:
        """The brackets."""
        upper = self.upper
        by = np.where(self._known <= self.points.size, self._by, self.points.by)
        beyond = upper > self.levels[-1]
        return ImageRadii(
            self.threat,
            self.levels,
            np.where(beyond, np.inf, upper),
            np.where(beyond, "", by).astype(np.str_),
            _proven(self.subject, self.threat, self.levels),
        )

    def _search(self, kind: str, name: str, attack: Attack, rows: NDArray[np.int64]) -> None:
        """Attack the images at `rows`, and keep the points that are nearer than those so far.

        The pieces of a search are found again by its `kind`, its `name` and its threat model.
        """
        if not len(rows):
            return
        own = threat_of(attack)
        assert own is not None, "only such attacks are run"
        piece = f"{RADII} {kind} {own.norm} {own.eps!r} {name}"
        found = self.subject.attack(attack, rows, piece, threat=own)
        counts = (a + b for a, b in zip(self.cost[1:], found[1:], strict=True))
        self.cost = AttackResult(found.x_adv, *counts)
        self.points.offer(found.x_adv, self.subject.predict(found.x_adv), own.eps, name)


def _sizes_in(ledger: Ledger, threat: Threat) -> tuple[Sizes, NDArray[np.object_]]:
    """The size of the smallest perturbation of each image in a ledger, and what found it.

    An attack of an inner norm within the threat model counts by its own size, which is no smaller
    than that in the norm of `threat`.
    """
    wrong = ledger.misclassified
    upper = np.where(wrong, 0.0, np.inf)
    by = np.where(wrong, CLEAN, "").astype(object)
    for name, outcome in ledger.outcomes.items():
        # In float32 a radius may be rounded up.
        size = outcome.size.astype(np.float64)
        if threat.covers(outcome.threat):
            size = np.minimum(size, outcome.threat.eps)
        elif outcome.threat.norm is threat.norm:
            # A larger ball is no part of the worst case, whatever was found in it.
            size = np.clip(size, np.nextafter(threat.eps, np.inf), outcome.threat.eps)
        else:
            continue
        nearer = outcome.broke & (size < upper)
        upper[nearer], by[nearer] = size[nearer], name
    return upper, by


def _proven(subject: EvaluationSession, threat: Threat, levels: Sequence[float]) -> Sizes | None:
    """The largest of the levels within which bounds prove each image, or 0; None without bounds."""
    if subject.random:
        return None
    channels, height, width = subject.x.shape[1:]
    try:
        # A network that can bear boxes; linear bounds, in any norm, may know fewer operations.
        refuse_unbounded(subject.model, (channels, height, width), Norm.linf, RADII)
        return _bisected(subject, threat, np.array([0.0, *levels]))
    except (InputError, MemoryError):
        return None


def _bisected(subject: EvaluationSession, threat: Threat, levels: Sizes) -> Sizes:
    """The largest level that bounds prove; those below it hold as well, since balls are nested."""
    box = Interval.around(subject.x[:1], float(levels[1]))
    refine = sum(Graph(subject.model, box).sizes) <= REFINED
    held = np.zeros(len(subject.y), dtype=np.int64)
    open_from = np.full_like(held, len(levels))
    while len(rows := np.flatnonzero(open_from - held > 1)):
        middle = (held + open_from)[rows] // 2
        for place in np.unique(middle):
            here = rows[middle == place]
            some = subject.take(torch.from_numpy(here))
            within = threat.at(float(levels[place]))
            bounds = linear.margins(some.model, some.x, some.y, within, refine=refine)
            proven = (bounds.amin(1) > 0).cpu().numpy()
            held[here[proven]] = place
            open_from[here[~proven]] = place
    return np.asarray(levels[held])
