"""The findings of an audit: checks with a verdict, and rows for the files of a run."""

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from robusttrain.report.ledger import Point, Row
from robusttrain.threat import Threat


class Verdict(StrEnum):
    """The outcome of a check."""

    passed = "pass"
    warned = "warn"
    failed = "fail"


class Check(NamedTuple):
    """A row of `audit.csv`: the check, its figure, its thresholds, and the verdict."""

    check: str
    figure: float
    threshold: str
    verdict: Verdict


class Audit(NamedTuple):
    """What an audit adds to an evaluation: rows for three files.

    `threat` is the threat model that an audit has searched; None where only single checks were
    made.
    """

    controls: list[Row]
    curve: list[Point]
    checks: list[Check]
    threat: Threat | None = None

    def joined(self, other: "Audit") -> "Audit":
        """The rows of both."""
        return Audit(
            [*self.controls, *other.controls],
            [*self.curve, *other.curve],
            [*self.checks, *other.checks],
            self.threat or other.threat,
        )

    def verdict(self, threats: Sequence[Threat]) -> str:
        """The verdict on a worst case of these threat models: pass, warn, fail or none.

        A failed check casts doubt on all of them. Otherwise only what was audited has a verdict.
        """
        verdicts = [check.verdict for check in self.checks]
        if Verdict.failed in verdicts:
            return Verdict.failed
        if any(threat != self.threat for threat in threats):
            return "none"
        return Verdict.warned if Verdict.warned in verdicts else Verdict.passed


NO_AUDIT = Audit([], [], [])


def graded(check: str, figure: float, warn: float, fail: float) -> Check:
    """Pass up to `warn`, warn up to `fail`, fail above; at most warn where `fail` is infinite."""
    rounded = round(figure, 6)
    verdict = Verdict.passed if rounded <= warn else Verdict.warned
    verdict = Verdict.failed if rounded > fail else verdict
    worse = f" / {fail:.3g}" if math.isfinite(fail) else " / -"
    threshold = f"{warn:.3g}" + ("" if warn == fail else worse)
    return Check(check, figure, threshold, verdict)
