"""One status for each image: what bounds and branching prove of what attacks leave standing."""

import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robusttrain.attacks.model_view import predictions
from robusttrain.bounds.branching import Decision, Status, decide
from robusttrain.bounds.intervals import Interval, NoRuleError
from robusttrain.bounds.linear import float64_copy, margins
from robusttrain.evaluation.findings import Audit, graded
from robusttrain.evaluation.session import EvaluationSession
from robusttrain.evaluation.settings import Bounds, Verification
from robusttrain.evaluation.validity import checked
from robusttrain.models.passes import Passes
from robusttrain.report.ledger import Ledger, Outcome, Row, scattered
from robusttrain.report.proofs import (
    BRANCHING,
    BROKEN,
    BROKEN_PROOFS,
    EXCEEDED_BOUNDS,
    INTERVALS,
    LINEAR,
    PROVEN,
    ROWS,
    UNDECIDED,
    Proofs,
)
from robusttrain.runtime.out_of_memory import is_out_of_memory
from robusttrain.runtime.progress import Advance, unreported
from robusttrain.seeding import generator_for
from robusttrain.threat import Threat
from robusttrain.threat.balls import ball, in_float64

# Images whose linear bounds are computed together, and lost together by a kill.
IMAGES_AT_ONCE = 16

# What a bound may exceed a margin in float32 by, relative to 1 and the margin.
ROUNDING = 1e-3

# Why an image is undecided, besides the reasons of branching.
TIME, MEMORY = "time", "memory"
NO_RULE = "no bound for an operation"
TOO_LOOSE = "bounds are too loose"
NOT_REPEATED = "a counterexample was not repeated in float32"
RANDOM = "the model draws noise"

# Checks of the audit.
FAILURES = "images on which verification failed"
UNREPEATED = "counterexamples that were not repeated"


def verify(
    subject: EvaluationSession,
    ledger: Ledger,
    settings: Verification,
    threat: Threat,
    advance: Advance = unreported,
) -> Audit:
    """Give each image of `ledger` its status, and return the rows and the checks of the proofs.

    Intervals are computed for all images. Linear bounds and branching follow for those that no
    attack within `threat` broke, as long as no method has proven them. Counterexamples of branching
    enter the ledger as an outcome, if the model misclassifies them again in float32. Of a model
    that draws noise, declared or not, nothing is proven: bounds are of one draw. `advance` gets how
    many more images are done.
    """
    search = _Search(subject, ledger, settings, threat, advance)
    search.run()
    return search.audit()


def _by_intervals(subject: EvaluationSession, eps: float) -> NDArray[np.floating]:
    """Lower bounds of the least margin of each image within linf `eps`, by intervals, (N,)."""
    parts = (torch.split(part, subject.batch_size) for part in (subject.x, subject.y))
    # What TF32 rounds off may be more than a proof has to spare.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found = [_least_margins(subject.model, x, y, eps) for x, y in zip(*parts, strict=True)]
    return torch.cat(found).cpu().numpy()


def _least_margins(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    above = cast(Interval, model(Interval.around(x, eps))).margins(y)
    return -above.scatter(1, y[:, None], -torch.inf).amax(1)


@dataclass
class _Search:
    """The methods, one after the other, and what they found of each image."""

    subject: EvaluationSession
    ledger: Ledger
    settings: Verification
    threat: Threat
    advance: Advance

    def __post_init__(self) -> None:
        count = len(self.ledger.index)
        self.standing = ~self.ledger.worst_case(self.threat)
        self.by, self.because = (np.full(count, "", dtype=object) for _ in range(2))
        self.seconds, self.bounds = np.zeros(count), np.full(count, -np.inf)
        self.failed = np.zeros(count, dtype=np.bool_)
        self.points: dict[int, Tensor] = {}
        self.unrepeated = 0

    def run(self) -> None:
        """Run the methods, the cheapest first."""
        if self.subject.random:
            self.because[:] = RANDOM
            self.advance(len(self.because))
            return
        self._intervals()
        if self.settings.bounds is not Bounds.intervals:
            rows = np.array(self._open(), dtype=np.int64)
            for start in range(0, len(rows), IMAGES_AT_ONCE):
                self._linear(rows[start : start + IMAGES_AT_ONCE])
        left = self._open()
        if not self.settings.branching:
            self.advance(len(left))
        elif left:
            self._branching(left)

    def audit(self) -> Audit:
        """The rows and the checks of the proofs, which the ledger gets."""
        by, because = (texts.astype(np.str_) for texts in (self.by, self.because))
        proofs = self.ledger.proofs = Proofs(self.threat, by, self.seconds, because)
        wrong, broken = self.ledger.misclassified, self.ledger.worst_case(self.threat)
        status = proofs.status(wrong, broken)
        counted = {row: (status == PROVEN) & (by == method) for method, row in ROWS.items()}
        counted |= {UNDECIDED: status == UNDECIDED, "verified": proofs.proven}
        exceeded = self.bounds > _reached(self.ledger, self.threat)
        checks = {
            BROKEN_PROOFS: (broken & proofs.proven, 0.0),
            EXCEEDED_BOUNDS: (exceeded, 0.0),
            FAILURES: (self.failed, np.inf),
        }
        found = [graded(name, int(f.sum()), 0, fail) for name, (f, fail) in checks.items()]
        found.append(graded(UNREPEATED, self.unrepeated, 0, np.inf))
        rows = [Row.counted(name, self.threat, ~flags) for name, flags in counted.items()]
        return Audit(rows, [], found)

    def _open(self) -> list[int]:
        """Which images are neither broken nor proven."""
        return np.flatnonzero(self.standing & (self.by == "")).tolist()

    def _intervals(self) -> None:
        started = time.perf_counter()
        found = _by_intervals(self.subject, self.threat.eps)
        everything = np.arange(len(found))
        self._enter(everything, INTERVALS, found, time.perf_counter() - started)
        self.because[:] = TOO_LOOSE
        self.advance(len(found) - len(self._open()))

    def _linear(self, rows: NDArray[np.int64]) -> None:
        """Linear bounds of the images at `rows`."""
        x, y = (part[torch.from_numpy(rows)] for part in (self.subject.x, self.subject.y))
        steps = self.settings.steps if self.settings.bounds is Bounds.optimised else 0
        seconds = self.settings.seconds * len(rows)

        def bounded() -> dict[str, Any]:
            model = self.subject.model
            found = margins(model, x, y, self.threat, optimise=steps, seconds=seconds)
            return {"bounds": found.amin(1).cpu()}

        piece = self._piece(f"linear bounds {self.ledger.index[rows].tolist()}", bounded)
        found = piece["bounds"].numpy() if "bounds" in piece else np.full(len(rows), -np.inf)
        self._enter(rows, LINEAR, found, piece["seconds"])
        self.failed[rows] |= piece["failed"]
        self.because[rows] = piece["because"] or TOO_LOOSE
        self.advance(int((self.by[rows] != "").sum()))

    def _branching(self, rows: list[int]) -> None:
        """Branch and bound on the images at `rows`, and a replay of its counterexamples."""
        passes, seconds, tried = Passes(), 0.0, []
        for row in rows:
            left = self.settings.seconds - self.seconds[row]
            if left > 0:
                piece = self._branched(row, left)
                tried.append(row)
                seconds += piece["seconds"]
                passes.forward += piece.get("forward", 0)
                passes.backward += piece.get("backward", 0)
            else:
                self.because[row] = TIME
            self.advance(1)
        if tried:
            self._replay(np.array(tried), passes, seconds)

    def _branched(self, row: int, seconds: float) -> Mapping[str, Any]:
        own, index = slice(row, row + 1), self.ledger.index[row]
        x, y = self.subject.x[own], self.subject.y[own]

        def decided() -> dict[str, Any]:
            model, passes = self.subject.model, Passes()
            draws = generator_for(self.subject.seed, f"branching {index}", x.device)
            with passes.counting(model):
                found = decide(model, x, y, self.threat, seconds=seconds, generator=draws)
            return _as_piece(found) | {"forward": passes.forward, "backward": passes.backward}

        piece = self._piece(f"branching {index}", decided)
        bound = piece["bound"] if piece.get("status") == PROVEN else -np.inf
        self._enter(np.array([row]), BRANCHING, np.array([bound]), piece["seconds"])
        self.failed[row] |= piece["failed"]
        self.because[row] = piece["because"]
        if piece.get("point") is not None:
            self.points[row] = piece["point"]
        return piece

    def _piece(self, key: str, work: Callable[[], dict[str, Any]]) -> Mapping[str, Any]:
        """What `work` returns, or how it failed, and its seconds; known if it was done before."""
        name = f"verification {key}"
        known = self.subject.saved.get(name)
        if known is not None:
            return known
        started = time.perf_counter()
        try:
            found = {"because": "", "failed": False, **work()}
        # Whatever goes wrong with one method is counted, and others follow.
        except Exception as error:
            found = _failure(error)
        found["seconds"] = time.perf_counter() - started
        self.subject.saved.put(name, found)
        return found

    def _enter(
        self, rows: NDArray[np.int64], method: str, bounds: NDArray[np.floating], seconds: float
    ) -> None:
        """Note lower bounds of the margins of the images at `rows`, which took `seconds`."""
        self.seconds[rows] += seconds / len(rows)
        self.bounds[rows] = np.fmax(self.bounds[rows], bounds)
        self.by[rows[bounds > 0]] = method

    def _replay(self, rows: NDArray[np.int64], passes: Passes, seconds: float) -> None:
        """Let counterexamples count that a fresh copy of the model misclassifies."""
        fresh = self.subject.take(torch.from_numpy(rows))
        fresh.model = deepcopy(self.subject.model)
        found = np.array([row in self.points for row in rows])
        z = [self.points.get(row, self.subject.x[row][None]) for row in rows]
        x_adv, invalid = checked(torch.cat(z), fresh.x, self.threat, fresh.batch_size)
        seen, label = fresh.predict(x_adv), self.ledger.label[rows]
        broken = found & (seen.prediction != label)
        in_both = broken & (_in_float64(fresh.model, x_adv, fresh.batch_size) != label)
        self.unrepeated = int((found & ~in_both).sum())
        self.because[rows[found & ~broken]] = NOT_REPEATED

        def among_all(values: NDArray[Any]) -> NDArray[Any]:
            return scattered(values, rows, len(self.ledger.index))

        searched = among_all(np.ones_like(broken))
        outcome = Outcome(
            threat=self.threat,
            broken=among_all(broken),
            margin=among_all(seen.margin),
            size=among_all(ball(self.threat).norm(x_adv - fresh.x).cpu().numpy()),
            seconds=seconds,
            attacked=searched,
            sampled=searched,
            forward_passes=passes.forward,
            backward_passes=passes.backward,
            invalid=invalid,
            prediction=among_all(seen.prediction),
        )
        self.ledger.enter(BRANCHING, outcome, rows, x_adv.cpu().numpy())


def _as_piece(decision: Decision) -> dict[str, Any]:
    status = {Status.proven: PROVEN, Status.counterexample: BROKEN, Status.undecided: UNDECIDED}
    return {
        "status": status[decision.status],
        "because": decision.reason.value,
        "bound": decision.bound,
        "point": decision.point,
    }


def _failure(error: Exception) -> dict[str, Any]:
    """What is known of images on which a method failed with `error`."""
    if isinstance(error, NoRuleError):
        return {"because": NO_RULE, "failed": False}
    no_memory = isinstance(error, RuntimeError) and is_out_of_memory(error)
    if no_memory or isinstance(error, MemoryError):
        return {"because": MEMORY, "failed": True}
    first = str(error).partition("\n")[0]
    return {"because": f"error: {type(error).__name__}: {first}", "failed": True}


def _in_float64(model: nn.Module, x: Tensor, batch_size: int) -> NDArray[np.int64]:
    """The classes that a copy of the model in float64 predicts, (N,)."""
    exact, images = float64_copy(model), torch.split(in_float64(x), batch_size)
    with torch.no_grad():
        found = torch.cat([predictions(exact(part)) for part in images])
    return found.cpu().numpy()


def _reached(ledger: Ledger, threat: Threat) -> NDArray[np.floating]:
    """The least margin of each image that an attack within `threat` has reached, and rounding."""
    least = ledger.margin
    for outcome in ledger.within(threat).values():
        unseen = False if outcome.sampled is None else ~outcome.sampled
        least = np.fmin(least, np.where(unseen, np.inf, outcome.margin))
    return least + ROUNDING * (1 + np.abs(least))
