"""What a closer look at an evaluation finds: checks with a verdict, and rows for its files."""

from enum import StrEnum
from typing import NamedTuple

from robusttrain.report.ledger import Point, Row


class Verdict(StrEnum):
    """The outcome of a check."""

    passed = "pass"
    warned = "warn"
    failed = "fail"


class Check(NamedTuple):
    """A row of `audit.csv`: what was asked for, the figure, its thresholds, and the verdict."""

    check: str
    figure: float
    threshold: str
    verdict: Verdict


class Audit(NamedTuple):
    """What a closer look at an evaluation gives: rows for three files."""

    controls: list[Row]
    curve: list[Point]
    checks: list[Check]

    def joined(self, other: "Audit") -> "Audit":
        """The rows of both."""
        return Audit(
            [*self.controls, *other.controls],
            [*self.curve, *other.curve],
            [*self.checks, *other.checks],
        )


NO_AUDIT = Audit([], [], [])


def graded(check: str, figure: float, warn: float, fail: float) -> Check:
    """Pass up to `warn`, warn up to `fail`, fail above."""
    rounded = round(figure, 6)
    verdict = Verdict.passed if rounded <= warn else Verdict.warned
    verdict = Verdict.failed if rounded > fail else verdict
    threshold = f"{warn:.3g}" if warn == fail else f"{warn:.3g} / {fail:.3g}"
    return Check(check, figure, threshold, verdict)
