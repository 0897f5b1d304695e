"""The findings of an audit: checks with a verdict, and rows for the files of a run."""

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from robusttrain.report.ledger import Point, Row
from robusttrain.threat import Threat


class Verdict(StrEnum):
    """The outcome of a check."""

    passed = "pass"
    warned = "warn"
    failed = "fail"


class Check(NamedTuple):
    """A row of `audit.csv`: the check, its figure, its thresholds, and the verdict.

    `threat` is the threat model that an audit has searched; None for a single check.
    """

    check: str
    figure: float
    threshold: str
    verdict: Verdict
    threat: Threat | None = None

    def as_dict(self) -> dict[str, Any]:
        """The columns of `audit.csv`, with the threat as `norm` and `eps`."""
        own = self._asdict()
        threat = own.pop("threat")
        return own | {"norm": str(threat.norm) if threat else "", "eps": threat and threat.eps}


class Audit(NamedTuple):
    """What an audit adds to an evaluation: rows for three files.

    `threats` are the threat models that an audit has searched; none where only single checks were
    made.
    """

    controls: list[Row]
    curve: list[Point]
    checks: list[Check]
    threats: tuple[Threat, ...] = ()

    def joined(self, other: "Audit") -> "Audit":
        """The rows of both."""
        return Audit(
            [*self.controls, *other.controls],
            [*self.curve, *other.curve],
            [*self.checks, *other.checks],
            (*self.threats, *other.threats),
        )

    def verdict(self, threats: Sequence[Threat]) -> str:
        """The verdict on a worst case of these threat models: pass, warn, fail or none.

        A failed check casts doubt on all of them. Otherwise only what was audited has a verdict,
        by the checks of its own audit and those of none.
        """
        if Verdict.failed in [check.verdict for check in self.checks]:
            return Verdict.failed
        if not set(threats) <= set(self.threats):
            return "none"
        verdicts = [c.verdict for c in self.checks if c.threat is None or c.threat in threats]
        return Verdict.warned if Verdict.warned in verdicts else Verdict.passed


# The columns of `audit.csv`.
CHECK_COLUMNS = ("check", "figure", "threshold", "verdict", "norm", "eps")

NO_AUDIT = Audit([], [], [])


def graded(check: str, figure: float, warn: float, fail: float) -> Check:
    """Pass up to `warn`, warn up to `fail`, fail above; at most warn where `fail` is infinite."""
    rounded = round(figure, 6)
    verdict = Verdict.passed if rounded <= warn else Verdict.warned
    verdict = Verdict.failed if rounded > fail else verdict
    worse = f" / {fail:.3g}" if math.isfinite(fail) else " / -"
    threshold = f"{warn:.3g}" + ("" if warn == fail else worse)
    return Check(check, figure, threshold, verdict)
