"""Runs side by side: their ledgers paired sample by sample, and McNemar's test for each pair."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from robusttrain.errors import InputError
from robusttrain.report.ledger import CONFIDENCE
from robusttrain.run_directory import REPORT, SAMPLES
from robusttrain.threat import Norm, Threat

MEASURES = ("clean", "worst_case")
SIGNIFICANT = 0.05

TEXT = ("dataset", "model", "defense", "noise", "seed", "attack", "norm")
FIGURES = ("eps", "n", "accuracy", "ci_low", "ci_high")
WHOLE = ("index", "label", "clean_prediction")
BROKEN = "_broken"


@dataclass(frozen=True)
class Run:
    """A finished run, as its files tell.

    Parameters
    ----------
    folder
        Its directory, as it was given.
    report
        The rows `clean` and `worst_case` of its `report.csv`, indexed by these words.
    attacks
        The attacks of its evaluation.
    samples
        `label`, and for each measure whether the model is right; indexed by position in the test
        set.
    """

    folder: Path
    report: pd.DataFrame
    attacks: tuple[str, ...]
    samples: pd.DataFrame

    @property
    def threat(self) -> Threat:
        """What the worst case is of."""
        row = self.report.to_dict("index")["worst_case"]
        return Threat(Norm(row["norm"]), float(row["eps"]))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of some directories, in their order.

    Raises
    ------
    InputError
        If there are fewer than two, one is given twice, or one does not hold a finished evaluation.
    """
    if len(folders) < 2:
        given = " and ".join(map(str, folders)) or "no runs"
        raise InputError(given, allowed="give two runs or more", problem="cannot be compared")
    for first, second in combinations(folders, 2):
        if first.resolve() == second.resolve():
            raise InputError(
                f"{first} and {second}", allowed="give each one once", problem="are the same run"
            )
    return [read_run(folder) for folder in folders]


def read_run(folder: Path) -> Run:
    """The run of one directory.

    Raises
    ------
    InputError
        If it does not hold a finished evaluation.
    """
    samples = _read(folder / SAMPLES, dict.fromkeys(WHOLE, "int64"))
    if not samples["index"].is_unique:
        raise InputError(str(folder / SAMPLES), problem="has two rows of the same sample")
    broken = samples.filter(regex=f"{BROKEN}$")
    right = samples["clean_prediction"] == samples["label"]
    # Empty where an attack was spared a sample that had fallen before it: not equal to 1.
    standing = right & ~(broken == 1).any(axis=1)
    kept = samples[["index", "label"]].assign(clean=right, worst_case=standing)
    attacks = tuple(name.removesuffix(BROKEN) for name in broken.columns)

    kinds = dict.fromkeys(TEXT, "str") | dict.fromkeys(FIGURES, "float64")
    report = _read(folder / REPORT, kinds, na_filter=False)
    report = report[report["attack"].isin(MEASURES)].set_index("attack")
    if sorted(report.index) != sorted(MEASURES):
        raise InputError(
            str(folder / REPORT), problem="must have one row clean and one row worst_case"
        )
    return Run(folder, report, attacks, kept.set_index("index"))


def ranked(runs: Sequence[Run], measure: str) -> list[Run]:
    """The runs by accuracy, the highest first; a rank says nothing about significance."""
    return sorted(runs, key=lambda run: -run.report["accuracy"][measure])


def compare(runs: Sequence[Run], measures: Sequence[str] = MEASURES) -> pd.DataFrame:
    """Every pair of runs on the samples they share: a row for each pair and measure.

    `accuracy_a` and `accuracy_b` are shares of the `n` samples that both runs have, `difference` is
    the first minus the second, with its `paired_interval`. `b` samples are right in the first run
    only, `c` in the second only. `p` is that of McNemar's test in its exact form: two-sided and
    binomial, b of b + c against 1/2 (McNemar 1947). `p_holm` is corrected for all rows of the table
    (Holm 1979), so the chance that it names any false winner is 5 % at most. `winner` is empty
    unless `p_holm` is below 0.05.

    Raises
    ------
    InputError
        If two runs share no sample or give one different labels, or if the worst case is compared
        and their threat models differ.
    """
    if "worst_case" in measures:
        _require_one_threat(runs)
    pairs = [(a, b, *_paired(a, b)) for a, b in combinations(runs, 2)]

    # Takes a second to import, which runs that cannot be compared need not wait for.
    from statsmodels.stats.multitest import multipletests

    table = pd.DataFrame([_row(*pair, measure) for measure in measures for pair in pairs])
    table["p_holm"] = multipletests(table["p"], method="holm")[1]
    better = np.where(table["difference"] > 0, table["run_a"], table["run_b"])
    table["winner"] = np.where(table["p_holm"] < SIGNIFICANT, better, "")
    return table


def paired_interval(b: int, c: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a difference of paired proportions, (b - c) / n.

    Wald's interval after one sample has been added to each of b and c (Bonett and Price 2012,
    Journal of Educational and Behavioral Statistics 37, 479-488), cut at -1 and 1.
    """
    first, second = (b + 1) / (n + 2), (c + 1) / (n + 2)
    centre = first - second
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    half = z * math.sqrt((first + second - centre**2) / (n + 2))
    return max(-1.0, centre - half), min(1.0, centre + half)


def probability(p: float) -> str:
    """A p value in a table."""
    return f"{p:.4f}" if p >= 1e-4 else "<.0001"


def suites(runs: Sequence[Run]) -> list[str]:
    """The sets of attacks that the runs faced, as text; a single one where all faced the same."""
    return sorted({", ".join(sorted(run.attacks)) for run in runs})


def _row(a: Run, b: Run, right_a: pd.DataFrame, right_b: pd.DataFrame, key: str) -> dict[str, Any]:
    from statsmodels.stats.contingency_tables import mcnemar

    first, second = right_a[key], right_b[key]
    n, both = len(first), int((first & second).sum())
    only_a, only_b = int(first.sum()) - both, int(second.sum()) - both
    low, high = paired_interval(only_a, only_b, n)
    counts = [[both, only_a], [only_b, n - both - only_a - only_b]]
    return {
        "run_a": str(a.folder),
        "run_b": str(b.folder),
        "measure": key,
        "n": n,
        "accuracy_a": first.mean(),
        "accuracy_b": second.mean(),
        "difference": (only_a - only_b) / n,
        "ci_low": low,
        "ci_high": high,
        "b": only_a,
        "c": only_b,
        "p": mcnemar(counts, exact=True).pvalue,
    }


def _paired(a: Run, b: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What both runs say about the samples they share, in one order."""
    common = a.samples.index.intersection(b.samples.index)
    if common.empty:
        raise InputError(f"{a.folder} and {b.folder}", problem="have no test sample in common")
    first, second = a.samples.loc[common], b.samples.loc[common]
    other = common[first["label"] != second["label"]]
    if len(other):
        labels = f"{first['label'][other[0]]} and {second['label'][other[0]]}"
        raise InputError(
            f"{a.folder} and {b.folder}",
            allowed=f"sample {other[0]} is of class {labels}",
            problem="were not evaluated on the same data",
        )
    return first, second


def _require_one_threat(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        if run.threat != first.threat:
            raise InputError(
                f"{first.folder} ({first.threat}) and {run.folder} ({run.threat})",
                allowed="give runs of one norm and eps, or --clean to leave attacks out",
                problem="have different threat models",
            )


def _read(path: Path, kinds: Mapping[str, str], **options: Any) -> pd.DataFrame:
    """The columns `kinds` of a table, of these types, and those that say what an attack broke."""
    if not path.is_file():
        problem = "is not the directory of a finished evaluation"
        raise InputError(str(path.parent), allowed=f"it has no {path.name}", problem=problem)
    try:
        table: pd.DataFrame = pd.read_csv(
            path,
            dtype=defaultdict(lambda: "float64", kinds),
            usecols=lambda name: name in kinds or name.endswith(BROKEN),
            **options,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(str(path), allowed=reason, problem="cannot be read") from error
    missing = [name for name in kinds if name not in table.columns]
    if missing:
        raise InputError(str(path), problem=f"lacks the columns {', '.join(missing)}")
    return table
