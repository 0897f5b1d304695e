"""The ledger: what each attack did to each test image. Every reported figure is counted from it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robusttrain.threat import Threat

CONFIDENCE = 0.95

Flags = NDArray[np.bool_]
Floats = NDArray[np.floating]


def wilson(right: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of the share `right` of `n` (Wilson 1927), within [0, 1]."""
    # Takes a second to import, which a command line with a mistake in it need not wait for.
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(right, n, 1 - CONFIDENCE, method="wilson")
    return float(low), float(high)


@dataclass(frozen=True)
class Row:
    """A row of `report.csv`; what is not known stays empty.

    Parameters
    ----------
    attack
        What the accuracy is under, or the name of another measurement.
    threat
        The threat model that it was measured under.
    n
        How many images were counted.
    accuracy, ci_low, ci_high
        The share of them that is right, from 0 to 1, with its 95 % Wilson score interval.
    forward, backward
        Passes of an image through the model, in each direction.
    seconds
        Duration on all images.
    invalid
        How many images the attack returned that are no points of its threat model.
    """

    attack: str
    threat: Threat
    n: int
    accuracy: float
    ci_low: float
    ci_high: float
    forward: float = math.nan
    backward: float = math.nan
    seconds: float = math.nan
    invalid: float = math.nan

    @classmethod
    def counted(cls, attack: str, threat: Threat, broken: Flags, **cost: float) -> Self:
        """The row of images, some of them `broken`; `cost` has passes, seconds and `invalid`."""
        right, n = int((~broken).sum()), len(broken)
        return cls(attack, threat, n, right / n, *wilson(right, n), **cost)

    def as_dict(self) -> dict[str, Any]:
        """The columns of `report.csv`, with the threat as `norm` and `eps`."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        threat = own.pop("threat")
        return {"attack": own.pop("attack"), "norm": threat.norm, "eps": threat.eps, **own}


@dataclass(frozen=True)
class Point:
    """A point of a curve: what `row` has counted, with so many attack steps and noise draws."""

    curve: str
    steps: int | None
    eot: int | None
    row: Row

    def as_dict(self) -> dict[str, Any]:
        """The row of `curve.csv`."""
        counted = self.row.as_dict()
        kept = ("norm", "eps", "n", "accuracy", "ci_low", "ci_high")
        own = {"curve": self.curve, "steps": self.steps, "eot": self.eot}
        return own | {name: counted[name] for name in kept}


@dataclass(frozen=True)
class Outcome:
    """What one attack did, an entry for each image.

    Parameters
    ----------
    threat
        The threat model of the attack.
    broken
        Whether the image is misclassified, either by itself or under the attack, or, in a suite
        that attacks survivors only, under one of the attacks before.
    margin
        Score of the true class minus the largest other one at the attacked image.
    size
        Norm of the perturbation, in pixel units.
    seconds
        Duration of the attack on all images.
    attacked
        Whether the attack was run on the image; all where not given.
    forward_passes, backward_passes
        Images that the attack sent through the model, in each direction.
    non_finite
        How many of them met outputs or gradients that are not finite.
    invalid
        How many images it returned that are no points of its threat model: none of them is broken.
    """

    threat: Threat
    broken: Flags
    margin: Floats
    size: Floats
    seconds: float
    attacked: Flags | None = None
    forward_passes: int = 0
    backward_passes: int = 0
    non_finite: int = 0
    invalid: int = 0

    @property
    def broke(self) -> Flags:
        """Which images the attack was run on, and broke."""
        return self.broken if self.attacked is None else self.broken & self.attacked


@dataclass
class Ledger:
    """Outcomes of all attacks on the same images.

    Parameters
    ----------
    index
        Position of each image in the test set.
    label, prediction, margin
        Its class, what the model says about the clean image, and by how much.
    seconds
        Duration of the clean pass.
    outcomes
        What each attack did, in the order in which they ran.
    adversarial
        The image that broke each sample first, or else the attacked one of smallest margin, or the
        clean one: floats (N, C, H, W).
    proven
        For which images bounds prove that no attack of the radius of the run breaks them.
    """

    index: NDArray[np.int64]
    label: NDArray[np.int64]
    prediction: NDArray[np.int64]
    margin: Floats
    seconds: float
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    adversarial: Floats | None = None
    proven: Flags | None = None

    @property
    def misclassified(self) -> Flags:
        """Which clean images the model gets wrong."""
        return np.not_equal(self.prediction, self.label)

    @property
    def worst_case(self) -> Flags:
        """Which images any attack broke: one success is enough."""
        broken = [outcome.broken for outcome in self.outcomes.values()]
        return np.asarray(np.any([self.misclassified, *broken], axis=0), dtype=np.bool_)

    @property
    def broken_by(self) -> NDArray[np.str_]:
        """What broke each image first: `clean`, the name of an attack, or nothing ("")."""
        first = np.where(self.misclassified, "clean", "").astype(object)
        for name, outcome in self.outcomes.items():
            first[(first == "") & outcome.broken] = name
        return first.astype(np.str_)

    def samples(self) -> pd.DataFrame:
        """`samples.csv`: a row for each image.

        The entries of an attack that was not run on an image are empty.
        """
        columns: dict[str, Any] = {
            "index": self.index,
            "label": self.label,
            "clean_prediction": self.prediction,
            "clean_margin": self.margin,
        }
        for name, outcome in self.outcomes.items():
            ran = np.full_like(self.label, True) if outcome.attacked is None else outcome.attacked
            broken = pd.array(outcome.broken.astype(int), dtype="Int64")
            columns[f"{name}_broken"] = pd.Series(broken).where(ran.astype(bool))
            columns[f"{name}_margin"] = pd.Series(outcome.margin).where(ran.astype(bool))
            columns[f"{name}_size"] = pd.Series(outcome.size).where(ran.astype(bool))
        if self.proven is not None:
            columns["proven"] = self.proven.astype(int)
        columns["broken_by"] = self.broken_by
        return pd.DataFrame(columns)

    @property
    def largest_eps(self) -> float:
        """The largest radius of all attacks, in pixel units."""
        return max((outcome.threat.eps for outcome in self.outcomes.values()), default=0.0)

    def arrays(self) -> dict[str, Any]:
        """`adversarial.npz`: index, label and broken_by (N,), and images (N, C, H, W) in [0, 1]."""
        return {
            "index": self.index,
            "label": self.label,
            "broken_by": self.broken_by,
            "images": self.adversarial,
        }

    def report(self, threat: Threat, others: Sequence[Row] = ()) -> pd.DataFrame:
        """The attack columns of `report.csv`: clean first, then `others`, worst case last.

        `threat` is that of the run, whose norm the rows have that no single attack stands for.
        """
        clean = Row.counted(
            "clean",
            threat.at(0),
            self.misclassified,
            forward=1.0,
            backward=0.0,
            seconds=self.seconds,
            invalid=0,
        )
        rows = [clean]
        for name, o in self.outcomes.items():
            cost = {
                "forward": o.forward_passes / len(o.broken),
                "backward": o.backward_passes / len(o.broken),
                "seconds": o.seconds,
                "invalid": o.invalid,
            }
            rows.append(Row.counted(name, o.threat, o.broken, **cost))
        spent = {
            key: sum(getattr(row, key) for row in rows)
            for key in ("forward", "backward", "seconds", "invalid")
        }
        worst = Row.counted("worst_case", threat.at(self.largest_eps), self.worst_case, **spent)
        return pd.DataFrame([row.as_dict() for row in (*rows, *others, worst)])


def joined(ledgers: Sequence[Ledger]) -> Ledger:
    """One ledger of ledgers of different images under the same attacks, in order of the test set.

    It took as long as the longest of them.
    """
    if len(ledgers) == 1:
        return ledgers[0]
    order = np.argsort(np.concatenate([ledger.index for ledger in ledgers]))

    def together(parts: Sequence[Any], name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if name == "threat" or values[0] is None:
            return values[0]
        if name == "seconds":
            return max(values)
        return np.concatenate(values)[order] if np.ndim(values[0]) else sum(values)

    outcomes = {}
    for attack in ledgers[0].outcomes:
        parts = [ledger.outcomes[attack] for ledger in ledgers]
        outcomes[attack] = Outcome(**{f.name: together(parts, f.name) for f in fields(Outcome)})
    of_images = ("index", "label", "prediction", "margin", "seconds", "adversarial")
    return Ledger(outcomes=outcomes, **{name: together(ledgers, name) for name in of_images})
