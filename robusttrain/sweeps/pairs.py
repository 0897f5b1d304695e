"""Which settings of a sweep differ: tests of pairs of settings, and `sweep_pairs.csv`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from robusttrain import ranges
from robusttrain.errors import InputError
from robusttrain.report.compare import Run, decided, probability, shared, tested, titles
from robusttrain.report.files import intact, write_csv
from robusttrain.report.ledger import CLEAN, UNION, WORST_CASE
from robusttrain.run_directory import PAIRS, SWEEP_CONFIG
from robusttrain.sweeps.settings import ConfidenceInterval, Setting, student
from robusttrain.sweeps.trained import CHECKPOINT, SEED

# The keys, as they are typed.
BASELINE, COMPARED = "sweep.baseline", "sweep.accuracies"

# Of more settings, all pairs would be too many to read, and Holm's correction would hide most
# differences.
MOST_SETTINGS = 20

ACCURACIES = (CLEAN, WORST_CASE, UNION)

COLUMNS = (
    "first", "second", "measure", "norm", "eps", "seeds", "n", "accuracy_first", "accuracy_second",
    "difference", "ci_low", "ci_high", "b", "c", "p", "p_holm", "winner",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """What is compared in a sweep.

    Parameters
    ----------
    baseline
        Values by their keys. Each setting is compared with the one that has these values and is
        otherwise the same. If there are none, all settings that differ in one key are compared, but
        only in a sweep of up to `MOST_SETTINGS` settings.
    accuracies
        By which rows of `report.csv`: `clean`, `worst_case`, `union`.
    """

    baseline: Mapping[str, str] = field(default_factory=dict)
    accuracies: tuple[str, ...] = ACCURACIES

    @classmethod
    def of(cls, baseline: str | None, accuracies: str | Sequence[str] | None) -> "Comparison":
        """The comparison that the values of `sweep.baseline` and `sweep.accuracies` ask for.

        The baseline is a text of words `KEY=VALUE`, as tables name a setting.

        Raises
        ------
        InputError
            If a word of the baseline is not KEY=VALUE, or there is no such accuracy.
        """
        words = (baseline or "").split()
        for word in words:
            ranges.require("=" in word, BASELINE, baseline, "words of the form KEY=VALUE")
        if isinstance(accuracies, str):
            accuracies = accuracies.strip("[]").replace(",", " ").split()
        chosen = ACCURACIES if accuracies is None else tuple(accuracies)
        allowed = f"one or more of {', '.join(ACCURACIES)}"
        ok = bool(chosen) and set(chosen) <= {*ACCURACIES}
        ranges.require(ok, COMPARED, f"[{','.join(chosen)}]", allowed)
        return cls(dict(word.split("=", 1) for word in words), chosen)

    @classmethod
    def saved(cls, sweep_dir: Path) -> "Comparison":
        """What the last command of a sweep has compared; everything if it was no grid."""
        path = sweep_dir / SWEEP_CONFIG
        if not path.is_file():
            return cls()
        # Imported here, since a sweep that runs has it in memory.
        from omegaconf import OmegaConf

        with intact(path):
            saved = OmegaConf.load(path).hydra.callbacks.sweeps
            return cls.of(saved.get("baseline"), saved.get("accuracies"))

    @property
    def words(self) -> str:
        """The baseline as it is typed."""
        return " ".join(f"{key}={value}" for key, value in self.baseline.items())

    def check(self, values: Mapping[str, Sequence[str]]) -> None:
        """Check the baseline against the keys that vary in the sweep.

        Keys of models that were trained before are not known yet, so that nothing is checked where
        checkpoints vary.

        Parameters
        ----------
        values
            The values of each key; none if they are not known before the sweep.

        Raises
        ------
        InputError
            If the baseline has another key or value.
        """
        for key, value in self.baseline.items() if CHECKPOINT not in values else ():
            word = f"{key}={value}"
            known = ", ".join(name for name in values if name != SEED) or "none"
            ok = key in values and key != SEED
            ranges.require(ok, BASELINE, word, f"of the keys that vary, except seed: {known}")
            there = values[key]
            ok = not there or value in there
            ranges.require(ok, BASELINE, word, f"one of the values of {key}: {', '.join(there)}")

    def too_many(self, settings: Sequence[Setting]) -> bool:
        """Whether there are too many settings to compare them all."""
        return not self.baseline and len(settings) > MOST_SETTINGS

    def baselines(self, settings: Sequence[Setting]) -> list[Setting]:
        """The settings that have all values of the baseline."""
        return [setting for setting in settings if self.baseline.items() <= setting.keys.items()]

    def pairs(self, settings: Sequence[Setting]) -> list[tuple[Setting, Setting]]:
        """The pairs to compare; with a baseline, it is the second of each."""
        if self.too_many(settings):
            return []
        if not self.baseline:
            return [(a, b) for a, b in combinations(settings, 2) if len(_changed(a, b)) == 1]
        return [
            (setting, baseline)
            for baseline in self.baselines(settings)
            for setting in settings
            if (changed := _changed(setting, baseline)) and changed <= self.baseline.keys()
        ]


def pairwise(settings: Sequence[Setting], comparison: Comparison) -> pd.DataFrame:
    """Tests of pairs of settings: a row for each pair and each accuracy.

    It has the columns of `sweep_pairs.csv`, and `title`, which names the accuracy.

    Each seed that both have is tested with McNemar's exact test. `p` is the largest of these, or 1
    if the seeds do not all point in one direction: an intersection-union test (Berger 1982,
    Technometrics 24, 295-300) of the claim that the same network is better for every seed, which
    needs no correction for the number of seeds. `p_holm` is corrected for all rows (Holm 1979).
    `winner` is the better setting if `p_holm` is below 0.05, and empty otherwise. `b` and `c` are
    texts with a number for each seed.

    Worst cases are compared only under the same norm and eps, and unions only of the same ones. A
    pair that was not evaluated on the same data, or has no seed in common, has no row. Neither has
    one that classifies every image alike, such as a network at two radii by its clean accuracy:
    nothing can be tested there.
    """
    return tests(comparison.pairs(settings), comparison.accuracies)


def tests(pairs: Iterable[tuple[Setting, Setting]], accuracies: Sequence[str]) -> pd.DataFrame:
    """The tests of these pairs as in `pairwise`, corrected for all of them together."""
    rows = [row for pair in pairs for row in _rows(*pair, accuracies)]
    if not rows:
        return pd.DataFrame(columns=COLUMNS)
    return decided(pd.DataFrame(rows), "first", "second")


def lines(table: pd.DataFrame) -> pd.DataFrame:
    """The tests of `pairwise` as text for readers, in percent."""
    return pd.DataFrame([_line(row) for row in table.to_dict("records")])


def _line(row: Mapping[Any, Any]) -> dict[str, str]:
    counts = zip(row["b"].split(), row["c"].split(), strict=True)
    return {
        "first": row["first"],
        "second": row["second"],
        "accuracy": row["title"],
        "seeds": str(row["seeds"]),
        "difference": f"{100 * row['difference']:+.2f}",
        "95 % interval": f"{100 * row['ci_low']:+.2f} to {100 * row['ci_high']:+.2f}",
        "b, c by seed": "; ".join(f"{b}, {c}" for b, c in counts),
        "p": probability(row["p"]),
        "Holm": probability(row["p_holm"]),
        "winner": row["winner"],
    }


def write_pairs(sweep_dir: Path, table: pd.DataFrame) -> None:
    """Write `sweep_pairs.csv`."""
    write_csv(sweep_dir / PAIRS, table[[*COLUMNS]])


def _changed(a: Setting, b: Setting) -> set[str]:
    """The keys that both have, with different values."""
    return {key for key in a.keys.keys() & b.keys.keys() if a.keys[key] != b.keys[key]}


def _rows(a: Setting, b: Setting, accuracies: Sequence[str]) -> Iterator[dict[str, Any]]:
    pairs = [(a.runs[seed], b.runs[seed]) for seed in a.runs if seed in b.runs]
    if not pairs or any(_data(first) != _data(second) for first, second in pairs):
        return
    chosen = shared([run for pair in pairs for run in pair])
    measures = [measure for measure in chosen if measure.attack in accuracies]
    try:
        seeds = [tested(*pair, measures) for pair in pairs]
    except InputError:
        # Other images under the same name: a different split, or another draw of synthetic data.
        return
    for title, *rows in zip(titles(measures).values(), *seeds, strict=True):
        if any(row["b"] or row["c"] for row in rows):
            yield {"first": a.words, "second": b.words, "title": title} | _agreed(rows)


def _data(run: Run) -> str:
    return str(run.clean["dataset"])


def _agreed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Combine the tests of all seeds."""
    first, differences = rows[0], [row["difference"] for row in rows]
    one_way = min(differences) > 0 or max(differences) < 0
    of_images = ConfidenceInterval(first["ci_low"], first["ci_high"])
    low, high = student(differences) if len(rows) > 1 else of_images
    return {
        **{key: first[key] for key in ("measure", "norm", "eps", "n")},
        "seeds": len(rows),
        "accuracy_first": fmean(row["accuracy_a"] for row in rows),
        "accuracy_second": fmean(row["accuracy_b"] for row in rows),
        "difference": fmean(differences),
        "ci_low": max(-1.0, low),
        "ci_high": min(1.0, high),
        "b": " ".join(str(row["b"]) for row in rows),
        "c": " ".join(str(row["c"]) for row in rows),
        "p": max(row["p"] for row in rows) if one_way else 1.0,
    }
