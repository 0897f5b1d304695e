"""The ledger: what each attack did to each test image. Every reported figure is counted from it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

CONFIDENCE = 0.95

Flags = NDArray[np.bool_]
Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Outcome:
    """What one attack did, an entry for each image.

    Parameters
    ----------
    norm, eps
        The threat model of the attack; `eps` in pixel units.
    broken
        Whether the image is misclassified, either by itself or under the attack.
    margin
        Score of the true class minus the largest other one at the attacked image.
    size
        Norm of the perturbation, in pixel units.
    seconds
        Duration of the attack on all images.
    """

    norm: str
    eps: float
    broken: Flags
    margin: Floats
    size: Floats
    seconds: float


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
    """

    index: NDArray[np.int64]
    label: NDArray[np.int64]
    prediction: NDArray[np.int64]
    margin: Floats
    seconds: float
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def misclassified(self) -> Flags:
        """Which clean images the model gets wrong."""
        return np.not_equal(self.prediction, self.label)

    @property
    def worst_case(self) -> Flags:
        """Which images any attack broke: one success is enough."""
        broken = [outcome.broken for outcome in self.outcomes.values()]
        return np.asarray(np.any([self.misclassified, *broken], axis=0), dtype=np.bool_)

    def samples(self) -> pd.DataFrame:
        """`samples.csv`: a row for each image."""
        columns = {
            "index": self.index,
            "label": self.label,
            "clean_prediction": self.prediction,
            "clean_margin": self.margin,
        }
        for name, outcome in self.outcomes.items():
            columns[f"{name}_broken"] = outcome.broken.astype(int)
            columns[f"{name}_margin"] = outcome.margin
            columns[f"{name}_size"] = outcome.size
        return pd.DataFrame(columns)

    def report(self, norm: str) -> pd.DataFrame:
        """The attack columns of `report.csv`: clean first, worst case last.

        Accuracies are shares from 0 to 1, with 95 % Wilson score intervals. `norm` is that of the
        run, for the rows that no single attack stands for.
        """
        largest = max((outcome.eps for outcome in self.outcomes.values()), default=0.0)
        rows = [_row("clean", norm, 0.0, self.misclassified, self.seconds)]
        for name, o in self.outcomes.items():
            rows.append(_row(name, o.norm, o.eps, o.broken, o.seconds))
        spent = sum(row["seconds"] for row in rows)
        rows.append(_row("worst_case", norm, largest, self.worst_case, spent))
        return pd.DataFrame(rows)


def _row(attack: str, norm: str, eps: float, broken: Flags, seconds: float) -> dict[str, Any]:
    # Takes a second to import, which a command line with a mistake in it need not wait for.
    from scipy.stats import binomtest

    standing, n = int((~broken).sum()), len(broken)
    interval = binomtest(standing, n).proportion_ci(CONFIDENCE, method="wilson")
    return {
        "attack": attack,
        "norm": norm,
        "eps": eps,
        "n": n,
        "accuracy": standing / n,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "seconds": seconds,
    }
