"""Runs side by side: their ledgers paired sample by sample, and McNemar's test for each pair."""

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from robusttrain.errors import IdentityWarning, InputError
from robusttrain.report.files import intact, read_csv, read_json
from robusttrain.report.identity import refuse_mixed, warn_if_unfinished
from robusttrain.report.ledger import CLEAN, CONFIDENCE, UNION, WORST_CASE, Flags
from robusttrain.run_directory import MANIFEST, RADII, REPORT, SAMPLES
from robusttrain.threat import Norm, Threat

SIGNIFICANT = 0.05

TEXT = ("dataset", "model", "defense", "noise", "seed", "attack", "norm")
FIGURES = ("eps", "n", "accuracy", "ci_low", "ci_high")
WHOLE = ("index", "label", "clean_prediction")
BROKEN = "_broken"
# The row of what bounds prove.
VERIFIED = "verified"
# What files of earlier versions do not have. Positions in their test sets were all that they had.
NEW = ("audit", "index_in")
EARLIER_INDEX = "test set"


class Measure(NamedTuple):
    """What is compared: a row of `report.csv`, by its key.

    That of a union is what it is over: unions of other threat models are other figures.
    """

    attack: str
    threat: Threat | None = None
    union: frozenset[Threat] = frozenset()

    def __str__(self) -> str:
        """As tables name it: `clean`, `worst case (linf, eps 0.03)`."""
        words = self.attack.replace("_", " ")
        return words if self.threat is None else f"{words} ({self.threat})"


@dataclass(frozen=True)
class Run:
    """A finished run, as its files tell.

    Parameters
    ----------
    folder
        Its directory, as it was given.
    rows
        The rows of its `report.csv` that are compared: clean first, then a worst case for each
        threat model, then the union of several.
    attacks
        The attacks of its evaluation.
    label, right
        The class of each test image, and for each measure whether the model is right; indexed by
        the position of the image.
    index_in
        What the positions count, as in `samples.csv`: the `test set` or the `data set`.
    verified
        The rows of what bounds prove; most runs have none.
    digest
        What identifies the test set; empty if the manifest does not say it.
    radii
        The radii of its images, as in `radii.csv`; empty if they were not searched.
    """

    folder: Path
    rows: dict[Measure, Mapping[str, Any]]
    attacks: tuple[str, ...]
    label: pd.Series
    right: Mapping[Measure, pd.Series]
    index_in: str = EARLIER_INDEX
    verified: Sequence[Mapping[str, Any]] = ()
    digest: str = ""
    radii: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What it was measured by, the figure to quote last."""
        return tuple(self.rows)

    @property
    def threats(self) -> tuple[Threat, ...]:
        """The threat models that it was attacked in."""
        return threats_of(self.measures)

    @property
    def clean(self) -> Mapping[str, Any]:
        """The row `clean`."""
        return self.rows[Measure(CLEAN)]

    @property
    def quoted(self) -> Mapping[str, Any]:
        """The row over all attacks: the worst case, or the union of several."""
        return self.rows[self.measures[-1]]


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
        If it does not hold a finished evaluation, or holds results of several runs, or is damaged.
    """
    with intact(folder):
        return _run_in(folder)


def _run_in(folder: Path) -> Run:
    warn_if_unfinished(folder)
    refuse_mixed(folder, [SAMPLES, REPORT, RADII])
    samples = _read(folder / SAMPLES, dict.fromkeys(WHOLE, "int64"))
    if not samples["index"].is_unique:
        raise InputError(str(folder / SAMPLES), problem="has two rows of the same sample")
    samples = samples.set_index("index")
    kinds = dict.fromkeys(TEXT, "str") | dict.fromkeys(FIGURES, "float64")
    empty = {key: [""] for key in FIGURES}
    report = _read(folder / REPORT, kinds, keep_default_na=False, na_values=empty)
    rows = [{str(key): value for key, value in row.items()} for row in report.to_dict("records")]
    columns = map(str, samples.filter(regex=f"{BROKEN}$").columns)
    attacks = tuple(column.removesuffix(BROKEN) for column in columns)
    threats = {row["attack"]: _threat(row) for row in rows if row["attack"] in attacks}
    # The worst cases of an evaluation of the union alone are empty.
    known = [r for r in rows if r["attack"] != WORST_CASE or not math.isnan(r["accuracy"])]
    chosen = [row for row in known if row["attack"] in (CLEAN, WORST_CASE, UNION)]
    union = frozenset(_threat(row) for row in rows if row["attack"] == WORST_CASE)
    measured: dict[Measure, Mapping[str, Any]] = {_measure(row, union): row for row in chosen}
    if Measure(CLEAN) not in measured or not 2 <= len(measured) == len(chosen):
        problem = "must have one row clean and one row worst_case for each threat model"
        raise InputError(str(folder / REPORT), problem=problem)
    right = {measure: _right(samples, measure, threats) for measure in measured}
    for measure, row in measured.items():
        if not math.isclose(right[measure].mean(), row["accuracy"], abs_tol=1e-6):
            problem = f"has another accuracy, {measure}, than {SAMPLES} beside it"
            allowed = "they are of different runs or versions: evaluate it again"
            raise InputError(str(folder / REPORT), allowed=allowed, problem=problem)
    index_in = samples.get("index_in", pd.Series([EARLIER_INDEX])).iloc[0]
    verified = [row for row in rows if row["attack"] == VERIFIED]
    digest = str(read_json(folder / MANIFEST).get("data", {}).get("test", ""))
    label = samples["label"]
    radii = read_csv(folder / RADII)
    return Run(folder, measured, attacks, label, right, str(index_in), verified, digest, radii)


def _threat(row: Mapping[str, Any]) -> Threat:
    return Threat(Norm(row["norm"]), float(row["eps"]))


def _measure(row: Mapping[str, Any], union: frozenset[Threat]) -> Measure:
    attack = row["attack"]
    threat = _threat(row) if attack == WORST_CASE else None
    return Measure(attack, threat, union if attack == UNION else frozenset())


def _right(samples: pd.DataFrame, measure: Measure, threats: Mapping[str, Threat]) -> pd.Series:
    """For which images the model is right whatever the attacks of `measure` did."""
    right = samples["clean_prediction"] == samples["label"]
    if measure == Measure(CLEAN):
        return right
    beyond = [
        f"{attack}{BROKEN}"
        for attack, threat in threats.items()
        if measure.threat is not None and not measure.threat.covers(threat)
    ]
    # Empty where an attack was spared a sample that had fallen before it: not equal to 1.
    return right & ~(samples.filter(regex=f"{BROKEN}$").drop(columns=beyond) == 1).any(axis=1)


def titles(measures: Sequence[Measure]) -> dict[Measure, str]:
    """What each measure is called; of a single worst case its threat model goes without saying."""
    alone = sum(measure.threat is not None for measure in measures) == 1
    return {m: m.attack.replace("_", " ") if alone else str(m) for m in measures}


def ranked(runs: Sequence[Run], measure: Measure) -> list[Run]:
    """The runs by accuracy, the highest first; a rank says nothing about significance."""
    return sorted(runs, key=lambda run: -run.rows[measure]["accuracy"])


def threats_of(measures: Sequence[Measure]) -> tuple[Threat, ...]:
    """The threat models of some measures; those of the union, if it alone was counted."""
    each = tuple(m.threat for m in measures if m.threat is not None)
    return each or tuple(sorted(measures[-1].union, key=str))


def shared(runs: Sequence[Run]) -> tuple[Measure, ...]:
    """The measures that all of the runs have."""
    first, *others = runs
    return tuple(m for m in first.measures if all(m in run.rows for run in others))


def shared_measures(runs: Sequence[Run]) -> tuple[Measure, ...]:
    """What the runs can be compared by, with the figure to quote.

    Raises
    ------
    InputError
        If their threat models differ.
    """
    first = runs[0]
    for run in runs[1:]:
        if run.measures[-1] != first.measures[-1]:
            raise InputError(
                f"{_faced(first)} and {_faced(run)}",
                allowed="give runs of one norm and eps, or --clean to leave attacks out",
                problem="have different threat models",
            )
    return shared(runs)


def compare(runs: Sequence[Run], measures: Sequence[Measure]) -> pd.DataFrame:
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
        If two runs share no sample, give one different labels, or count positions differently.
    """
    pairs = [(a, b, _common(a, b)) for a, b in combinations(runs, 2)]
    table = pd.DataFrame([_row(*pair, measure) for measure in measures for pair in pairs])
    return decided(table, "run_a", "run_b")


def tested(a: Run, b: Run, measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """The rows of `compare` for two runs, a row for each measure, without Holm's correction.

    Raises
    ------
    InputError
        If the runs share no sample, give one different labels, or count positions differently.
    """
    common = _common(a, b)
    return [_row(a, b, common, measure) for measure in measures]


def decided(table: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """`table` with `p_holm`, which is `p` corrected for all rows (Holm 1979), and with `winner`.

    The winner is in the column `first` where `difference` is positive, and in `second` otherwise;
    it is empty unless `p_holm` is below 0.05.
    """
    # Takes a second to import, which runs that cannot be compared need not wait for. It collects
    # garbage whenever it is called, which takes a tenth of a second: call it once for a table.
    from statsmodels.stats.multitest import multipletests

    p_holm = multipletests(table["p"], method="holm")[1]
    better = np.where(table["difference"] > 0, table[first], table[second])
    return table.assign(p_holm=p_holm, winner=np.where(p_holm < SIGNIFICANT, better, ""))


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


def _row(a: Run, b: Run, common: "pd.Index[int]", measure: Measure) -> dict[str, Any]:
    # Imported here, since runs that cannot be compared need not wait for it.
    from scipy.special import bdtr

    first, second = _flags(a, common, measure), _flags(b, common, measure)
    n, only_a, only_b = len(common), int((first & ~second).sum()), int((~first & second).sum())
    low, high = paired_interval(only_a, only_b, n)
    return {
        "run_a": str(a.folder),
        "run_b": str(b.folder),
        "measure": measure.attack,
        "norm": measure.threat.norm if measure.threat else "",
        "eps": measure.threat.eps if measure.threat else math.nan,
        "n": n,
        "accuracy_a": first.mean(),
        "accuracy_b": second.mean(),
        "difference": (only_a - only_b) / n,
        "ci_low": low,
        "ci_high": high,
        "b": only_a,
        "c": only_b,
        # Twice the smaller tail of a fair coin.
        "p": min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5))),
    }


def _flags(run: Run, common: "pd.Index[int]", measure: Measure) -> Flags:
    """Whether a run is right on the samples `common`."""
    right = run.right[measure]
    # To choose them takes longer than to compare them.
    return (right if right.index.equals(common) else right.loc[common]).to_numpy()


def _common(a: Run, b: Run) -> "pd.Index[int]":
    """The samples that both runs have, in one order."""
    if a.index_in != b.index_in:
        allowed = (
            f"index in {SAMPLES} is a position in the {a.index_in} of one, and in the {b.index_in} "
            f"of the other; evaluate the older one again"
        )
        raise InputError(f"{a.folder} and {b.folder}", allowed=allowed, problem="cannot be paired")
    _warn_of_other_images(a, b)
    if a.label.equals(b.label):
        return a.label.index
    common = a.label.index.intersection(b.label.index)
    if common.empty:
        raise InputError(f"{a.folder} and {b.folder}", problem="have no test sample in common")
    first, second = a.label.loc[common], b.label.loc[common]
    other = common[first != second]
    if len(other):
        labels = f"{first[other[0]]} and {second[other[0]]}"
        raise InputError(
            f"{a.folder} and {b.folder}",
            allowed=f"sample {other[0]} is of class {labels}",
            problem="were not evaluated on the same data",
        )
    return common


def _warn_of_other_images(a: Run, b: Run) -> None:
    """Warn of test sets with different digests: one may be a part of the other, or not."""
    if a.digest and b.digest and a.digest != b.digest:
        line = (
            f"{a.folder} and {b.folder} have different test sets (data.test in {MANIFEST}): their "
            f"images are paired by position, which is right only if one set begins with the other"
        )
        warnings.warn(line, IdentityWarning, stacklevel=2)


def _faced(run: Run) -> str:
    return f"{run.folder} ({' and '.join(map(str, run.threats))})"


def _read(path: Path, kinds: Mapping[str, str], **options: Any) -> pd.DataFrame:
    """The columns `kinds` of a table, of these types, and those that say what an attack broke."""
    if not path.is_file():
        problem = "is not the directory of a finished evaluation"
        raise InputError(str(path.parent), allowed=f"it has no {path.name}", problem=problem)
    try:
        table: pd.DataFrame = pd.read_csv(
            path,
            dtype=defaultdict(lambda: "float64", {**kinds, **dict.fromkeys(NEW, "str")}),
            usecols=lambda name: name in (*kinds, *NEW) or name.endswith(BROKEN),
            **options,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(str(path), allowed=reason, problem="cannot be read") from error
    missing = [name for name in kinds if name not in table.columns]
    if missing:
        raise InputError(str(path), problem=f"lacks the columns {', '.join(missing)}")
    return table
