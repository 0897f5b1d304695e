"""The ledger: what each attack did to each test image. Every reported figure is counted from it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import NormalDist, fmean
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robusttrain.report.proofs import Proofs
from robusttrain.threat import Threat

CONFIDENCE = 0.95

# The row of the images as they are.
CLEAN = "clean"

# Rows over several attacks: of one threat model, and of all.
WORST_CASE, UNION = "worst_case", "union"

# Rows over several threat models: the means of their worst cases, and their union, which is last.
AVERAGE, GEOMETRIC_MEAN = "average", "geometric_mean"
OVER_SEVERAL = (AVERAGE, GEOMETRIC_MEAN, UNION)

# The searches of an audit.
PROBE = "probe"

# The searches for the radius of each image.
RADII = "radii"

Flags = NDArray[np.bool_]
Floats = NDArray[np.floating]


Verdict = Callable[[Sequence[Threat]], str]
"""What an audit says of figures under these threat models."""


def unaudited(threats: Sequence[Threat]) -> str:
    """The verdict where there was no audit."""
    return "none"


def wilson(right: float, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The score interval of the share `right` of `n` (Wilson 1927), within [0, 1]."""
    share, penalty = right / n, NormalDist().inv_cdf((1 + confidence) / 2) ** 2 / n
    centre = (share + penalty / 2) / (1 + penalty)
    margin = math.sqrt(penalty * (share * (1 - share) + penalty / 4)) / (1 + penalty)
    return max(0.0, centre - margin), min(1.0, centre + margin)


@dataclass(frozen=True)
class Row:
    """A row of `report.csv`; what is not known stays empty.

    Parameters
    ----------
    attack
        What the accuracy is under, or the name of another measurement.
    threat
        The threat model that it was measured under; None for a union of several.
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
    audit
        What the audit says of the figure: pass, warn, fail, or none where there was none. Empty
        where a row is not there to be quoted.
    """

    attack: str
    threat: Threat | None
    n: int
    accuracy: float
    ci_low: float
    ci_high: float
    forward: float = math.nan
    backward: float = math.nan
    seconds: float = math.nan
    invalid: float = math.nan
    audit: str = ""

    @classmethod
    def counted(cls, attack: str, threat: Threat | None, broken: Flags, **others: Any) -> Self:
        """The row of images of which some are `broken`, with its other columns."""
        right, n = int((~broken).sum()), len(broken)
        return cls(attack, threat, n, right / n, *wilson(right, n), **others)

    @classmethod
    def empty(cls, attack: str, threat: Threat, n: int) -> Self:
        """The row of a threat model that was not measured on `n` images by itself."""
        return cls(attack, threat, n, math.nan, math.nan, math.nan)

    def as_dict(self) -> dict[str, Any]:
        """The columns of `report.csv`, with the threat as `norm` and `eps`."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        threat = own.pop("threat")
        norm, eps = (threat.norm, threat.eps) if threat else ("", math.nan)
        return {"attack": own.pop("attack"), "norm": norm, "eps": eps, **own}


# The columns of `curve.csv`.
CURVE_COLUMNS = ("curve", "steps", "eot", "norm", "eps", "n", "accuracy", "ci_low", "ci_high")


@dataclass(frozen=True)
class Point:
    """A point of a curve: what `row` has counted, with so many attack steps and noise draws."""

    curve: str
    steps: int | None
    eot: int | None
    row: Row

    def as_dict(self) -> dict[str, Any]:
        """The row of `curve.csv`."""
        own = {"curve": self.curve, "steps": self.steps, "eot": self.eot}
        whole = self.row.as_dict() | own
        return {name: whole[name] for name in CURVE_COLUMNS}


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
    sampled
        Whether the attack was meant for the image; all where not given. Its row counts no other.
    forward_passes, backward_passes
        Images that the attack sent through the model, in each direction.
    non_finite
        How many of them met outputs or gradients that are not finite.
    invalid
        How many images it returned that are no points of its threat model: none of them is broken.
    prediction
        The class that the model predicts at the attacked image, or -1 for none.
    """

    threat: Threat
    broken: Flags
    margin: Floats
    size: Floats
    seconds: float
    attacked: Flags | None = None
    sampled: Flags | None = None
    forward_passes: int = 0
    backward_passes: int = 0
    non_finite: int = 0
    invalid: int = 0
    prediction: NDArray[np.int64] | None = None

    @property
    def broke(self) -> Flags:
        """Which images the attack was run on, and broke."""
        return self.broken if self.attacked is None else self.broken & self.attacked

    def row(self, name: str) -> Row:
        """The row of `report.csv` of an attack of this name."""
        counted = self.broken if self.sampled is None else self.broken[self.sampled]
        cost = {
            "forward": self.forward_passes / len(counted),
            "backward": self.backward_passes / len(counted),
            "seconds": self.seconds,
            "invalid": self.invalid,
        }
        return Row.counted(name, self.threat, counted, **cost)


@dataclass(frozen=True)
class Examples:
    """Images of a test set, before and after the attacks of one threat model.

    Parameters
    ----------
    threat
        The threat model.
    index
        Their positions in the test set, (M,).
    clean, adversarial
        The images, and what the attacks made of them: floats (M, C, H, W) in [0, 1].
    """

    threat: Threat
    index: NDArray[np.int64]
    clean: Floats
    adversarial: Floats

    @classmethod
    def joined(cls, parts: "Sequence[Examples]") -> "Examples":
        """The examples of several processes, which have different images."""
        arrays = [(part.index, part.clean, part.adversarial) for part in parts]
        return cls(parts[0].threat, *map(np.concatenate, zip(*arrays, strict=True)))


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
        For each threat model, the image that broke each sample first within it, or else the
        attacked one of smallest margin, or the clean one: floats (N, C, H, W).
    proofs
        What was proven of the images, if they were verified.
    examples
        A few of the images, clean and attacked, for a person to look at.
    union_only
        Whether attacks passed over what others broke under another threat model.
    """

    index: NDArray[np.int64]
    label: NDArray[np.int64]
    prediction: NDArray[np.int64]
    margin: Floats
    seconds: float
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    adversarial: dict[Threat, Floats] | None = None
    proofs: Proofs | None = None
    examples: "Examples | None" = None
    union_only: bool = False

    @property
    def misclassified(self) -> Flags:
        """Which clean images the model gets wrong."""
        return np.not_equal(self.prediction, self.label)

    @property
    def threats(self) -> list[Threat]:
        """The threat models of attacks on all images, in the order in which they ran."""
        whole = (outcome for outcome in self.outcomes.values() if outcome.sampled is None)
        return list(dict.fromkeys(outcome.threat for outcome in whole))

    def enter(self, name: str, outcome: Outcome, rows: NDArray[np.int64], points: Floats) -> None:
        """Let what a search after the suite has found count, as the row `name`.

        Parameters
        ----------
        name, outcome
            The name of its row, and what it did, an entry for each image of the ledger.
        rows
            The images that it was meant for, (M,).
        points
            What it found for them, (M, C, H, W). The points that are the first to break an image
            are kept where adversarial images are.
        """
        for threat, images in (self.adversarial or {}).items():
            if threat.covers(outcome.threat):
                new = (outcome.broken & ~self.worst_case(threat))[rows]
                images[rows[new]] = points[new]
        self.outcomes[name] = outcome

    @property
    def union(self) -> Flags:
        """Which images any attack broke: one success is enough."""
        return self._broken(self.outcomes)

    def worst_case(self, threat: Threat) -> Flags:
        """Which images an attack broke that looks no further than `threat` allows."""
        return self._broken(self.within(threat))

    def within(self, threat: Threat) -> dict[str, Outcome]:
        """What the attacks did that look no further than `threat` allows."""
        return {name: o for name, o in self.outcomes.items() if threat.covers(o.threat)}

    def broken_by(self, threat: Threat | None = None) -> NDArray[np.str_]:
        """What broke each image first: `clean`, the name of an attack, or nothing ("").

        Only attacks within `threat` count where it is given.
        """
        first = np.where(self.misclassified, CLEAN, "").astype(object)
        outcomes = self.outcomes if threat is None else self.within(threat)
        for name, outcome in outcomes.items():
            first[(first == "") & outcome.broken] = name
        return first.astype(np.str_)

    def worst_prediction(self, threat: Threat | None = None) -> NDArray[np.int64]:
        """The class predicted for what broke each image first; its label where nothing broke it.

        Only attacks within `threat` count where it is given.
        """
        first = self.broken_by(threat)
        predicted = np.where(first == CLEAN, self.prediction, self.label)
        for name, outcome in self.outcomes.items():
            assert outcome.prediction is not None, "whoever scores an attack knows it"
            by_it = first == name
            predicted[by_it] = outcome.prediction[by_it]
        return predicted

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
        if self.proofs is not None:
            within = self.worst_case(self.proofs.threat)
            columns |= self.proofs.columns(self.misclassified, within)
        columns["broken_by"] = self.broken_by()
        columns["worst_prediction"] = self.worst_prediction()
        return pd.DataFrame(columns)

    def arrays(self) -> dict[str, Any]:
        """`adversarial.npz`: an entry for each image, once for each threat model.

        index, label, broken_by, norm and eps (N,), and images (N, C, H, W) in [0, 1].
        """
        kept = self.adversarial or {}
        each = len(self.index)
        return {
            "index": np.tile(self.index, len(kept)),
            "label": np.tile(self.label, len(kept)),
            "broken_by": np.concatenate([self.broken_by(threat) for threat in kept]),
            "norm": np.repeat([str(threat.norm) for threat in kept], each),
            "eps": np.repeat([threat.eps for threat in kept], each),
            "images": np.concatenate(list(kept.values())),
        }

    def report(
        self,
        threat: Threat,
        others: Sequence[Row] = (),
        verdict: Verdict = unaudited,
        several: Sequence[Threat] = (),
    ) -> pd.DataFrame:
        """The attack columns of `report.csv`.

        Clean comes first, then the attacks, then `others`. A worst case for each threat model of
        the attacks come last, with the `verdict` on them. Then there are the means of those in
        `several`, if these are two or more, and the union of all where there is more than one. If
        images were passed over, an attack has what it and all before it left standing, and the
        worst cases are empty.
        The clean row states the norm of `threat`, as the worst case does where there are no
        attacks.
        """
        clean = Row.counted(
            CLEAN,
            threat.at(0),
            self.misclassified,
            forward=1.0,
            backward=0.0,
            seconds=self.seconds,
            invalid=0,
        )
        threats = self.threats or [threat.at(0)]
        worst = [self._worst_row(each, verdict) for each in threats]
        means = self._means(several, verdict) if len(several) > 1 else []
        union = [self._union_row(verdict)] if len(threats) > 1 else []
        rows = (clean, *self._attacked(), *others, *worst, *means, *union)
        return pd.DataFrame([row.as_dict() for row in rows])

    def _attacked(self) -> Iterator[Row]:
        """The rows of the attacks."""
        left = self.misclassified
        for name, outcome in self.outcomes.items():
            left = left | outcome.broken
            yield (replace(outcome, broken=left) if self.union_only else outcome).row(name)

    def _worst_row(self, threat: Threat, verdict: Verdict) -> Row:
        if self.union_only:
            return Row.empty(WORST_CASE, threat, len(self.index))
        spent = self._spent(self.within(threat))
        worst = self.worst_case(threat)
        return Row.counted(WORST_CASE, threat, worst, **spent, audit=verdict([threat]))

    def _means(self, threats: Sequence[Threat], verdict: Verdict) -> list[Row]:
        """The rows of the means over several threat models."""
        if self.union_only:
            return []
        within = {n: o for each in threats for n, o in self.within(each).items()}
        others = {**self._spent(within), "audit": verdict(threats)}
        right = [int((~self.worst_case(each)).sum()) for each in threats]
        return [_mean_row(name, right, len(self.index), others) for name in MEANS]

    def _union_row(self, verdict: Verdict) -> Row:
        spent = self._spent(self.outcomes)
        return Row.counted(UNION, None, self.union, **spent, audit=verdict(self.threats))

    def _spent(self, outcomes: Mapping[str, Outcome]) -> dict[str, float]:
        """What the clean pass and the attacks on all images cost together."""
        rows = [o.row(name) for name, o in outcomes.items() if o.sampled is None]
        return {
            "forward": 1 + sum(row.forward for row in rows),
            "backward": sum(row.backward for row in rows),
            "seconds": self.seconds + sum(row.seconds for row in rows),
            "invalid": sum(row.invalid for row in rows),
        }

    def _broken(self, outcomes: Mapping[str, Outcome]) -> Flags:
        broken = [outcome.broken for outcome in outcomes.values()]
        return np.asarray(np.any([self.misclassified, *broken], axis=0), dtype=np.bool_)


MEANS: Mapping[str, Callable[[Sequence[float]], float]] = {
    AVERAGE: fmean,
    GEOMETRIC_MEAN: lambda shares: math.prod(shares) ** (1 / len(shares)),
}


def _mean_row(name: str, right: Sequence[int], n: int, others: Mapping[str, Any]) -> Row:
    """A mean of several accuracies on the same `n` images, and an interval that it is in.

    By Bonferroni's inequality all k accuracies are within their intervals of confidence 1 - .05/k
    together in 95 % of all cases, however they depend on one another. The mean, which grows with
    each of them, is then between the means of the ends.
    """
    mean = MEANS[name]
    ends = [wilson(count, n, 1 - (1 - CONFIDENCE) / len(right)) for count in right]
    low, high = (mean(side) for side in zip(*ends, strict=True))
    return Row(name, None, n, mean([count / n for count in right]), low, high, **others)


def scattered(values: NDArray[Any], rows: NDArray[np.int64], count: int) -> NDArray[Any]:
    """The `values` (M,) of the images at `rows` among all `count` images; 0 for the others."""
    found = np.zeros(count, values.dtype)
    found[rows] = values
    return found


def joined(ledgers: Sequence[Ledger]) -> Ledger:
    """One ledger of ledgers of different images under the same attacks, in order of the test set.

    It took as long as the longest of them.
    """
    if len(ledgers) == 1:
        return ledgers[0]
    examples = [ledger.examples for ledger in ledgers if ledger.examples is not None]
    order = np.argsort(np.concatenate([ledger.index for ledger in ledgers]))

    def together(parts: Sequence[Any], name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if name == "threat" or values[0] is None:
            return values[0]
        if name == "seconds":
            return max(values)
        if name == "adversarial":
            return {
                key: np.concatenate([value[key] for value in values])[order] for key in values[0]
            }
        return np.concatenate(values)[order] if np.ndim(values[0]) else sum(values)

    outcomes = {}
    for attack in ledgers[0].outcomes:
        parts = [ledger.outcomes[attack] for ledger in ledgers]
        outcomes[attack] = Outcome(**{f.name: together(parts, f.name) for f in fields(Outcome)})
    of_images = ("index", "label", "prediction", "margin", "seconds", "adversarial")
    kept = Examples.joined(examples) if examples else None
    return Ledger(
        outcomes=outcomes,
        examples=kept,
        union_only=ledgers[0].union_only,
        **{name: together(ledgers, name) for name in of_images},
    )
