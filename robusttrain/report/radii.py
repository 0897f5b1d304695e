"""What the radii of all images say together: their median, and two runs paired image by image."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robusttrain.report.compare import Run, probability
from robusttrain.report.ledger import CONFIDENCE

# How to read `in_words`.
LEGEND = (
    "medians: of the radii in each run; larger: images whose radius is larger in that run",
    "p: Wilcoxon's signed-rank test, not corrected; radii beyond a search count as its end",
)


class Median(NamedTuple):
    """The median radius of the images in a norm, with an exact 95 % interval.

    The interval is between order statistics, and so it holds for any distribution (by the binomial
    one). `largest` is how far was searched; what lies beyond is inf. `unbroken` images have no
    smaller radius.
    """

    norm: str
    n: int
    median: float
    ci_low: float
    ci_high: float
    largest: float
    unbroken: int

    def as_dict(self) -> dict[str, Any]:
        """The figures for a file; those beyond the largest radius are None."""
        return {key: None if cell == math.inf else cell for key, cell in self._asdict().items()}

    def __str__(self) -> str:
        low, high = (f"{end:.4g}" if math.isfinite(end) else "more" for end in self[3:5])
        middle = f"{self.median:.4g}" if math.isfinite(self.median) else f"above {self.largest:.4g}"
        return (
            f"radius in {self.norm}: median {middle} (95 %: {low} to {high}) on {self.n} images; "
            f"{self.unbroken} not broken up to {self.largest:.4g}"
        )


def medians(table: pd.DataFrame) -> list[Median]:
    """The median of each norm of `radii.csv`, in the order of the file."""
    if table.empty:
        return []
    return [_median(str(norm), own) for norm, own in table.groupby("norm", sort=False)]


def _median(norm: str, table: pd.DataFrame) -> Median:
    # Imported here, since runs without radii need not wait for it.
    from scipy.special import bdtr

    upper = np.sort(_upper(table, math.inf))
    n = len(upper)
    # So many of the smallest are below the median of the distribution in all but 2.5 % of cases.
    outside = int((bdtr(np.arange(n), n, 0.5) <= (1 - CONFIDENCE) / 2).sum())
    low, high = (upper[outside - 1], upper[n - outside]) if outside else (0.0, math.inf)
    ends = float(np.median(upper)), float(low), float(high)
    largest, unbroken = float(table["largest"].iloc[0]), int(np.isinf(upper).sum())
    return Median(norm, n, *ends, largest, unbroken)


def _upper(table: pd.DataFrame, beyond: float) -> NDArray[np.float64]:
    """The smallest radii that broke the images; `beyond` where nothing did."""
    return np.asarray(table["upper"].astype(float).fillna(beyond), dtype=np.float64)


def compared(runs: Sequence[Run]) -> pd.DataFrame:
    """Every pair of runs with radii in the same norm, on the images that both have.

    Radii beyond `largest`, which is how far both were searched, count as `largest`. `larger_a` is
    the number of images whose radius is larger in the first run, `larger_b` in the second. `p` is
    that of Wilcoxon's signed-rank test (1945), two-sided: whether the differences are symmetric
    about 0. The table is empty without such pairs.
    """
    pairs = combinations(runs, 2)
    return pd.DataFrame([row for a, b in pairs for row in _paired(a, b)])


def in_words(pairs: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """The rows of `compared` as text; `names` maps the directory of a run to its name."""
    rows: list[Any] = pairs.to_dict("records")
    return pd.DataFrame(
        {
            "first": names[row["run_a"]],
            "second": names[row["run_b"]],
            "norm": row["norm"],
            "n": str(row["n"]),
            "medians": ", ".join(
                _reached(row[f"median_{run}"], row["largest"]) for run in ("a", "b")
            ),
            "larger": f"{row['larger_a']}, {row['larger_b']}",
            "p": probability(row["p"]),
        }
        for row in rows
    )


def _reached(median: float, largest: float) -> str:
    return f"{median:.4g}" if median < largest else f">= {largest:.4g}"


def _paired(a: Run, b: Run) -> Iterator[dict[str, Any]]:
    if a.radii.empty or b.radii.empty:
        return
    for norm, own in a.radii.groupby("norm", sort=False):
        both = own.merge(b.radii[b.radii["norm"] == norm], on="index", suffixes=("_a", "_b"))
        if len(both):
            yield {"run_a": str(a.folder), "run_b": str(b.folder), "norm": norm, **_tested(both)}


def _tested(both: pd.DataFrame) -> dict[str, Any]:
    # Imported here, since it takes a second.
    from scipy.stats import wilcoxon

    largest = float(both[["largest_a", "largest_b"]].to_numpy().min())
    first, second = (
        both[f"upper_{run}"].astype(float).fillna(math.inf).clip(upper=largest).to_numpy()
        for run in ("a", "b")
    )
    differ = bool((first != second).any())
    return {
        "n": len(both),
        "largest": largest,
        "median_a": float(np.median(first)),
        "median_b": float(np.median(second)),
        "larger_a": int((first > second).sum()),
        "larger_b": int((first < second).sum()),
        "p": float(wilcoxon(first, second).pvalue) if differ else 1.0,
    }
