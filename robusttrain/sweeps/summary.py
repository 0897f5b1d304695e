"""Write `sweep.md`: means over seeds, and tests of which settings of a sweep differ."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from robusttrain.errors import InputError
from robusttrain.report.compare import (
    SIGNIFICANT,
    Measure,
    Run,
    compare,
    probability,
    read_run,
    suites,
    titles,
)
from robusttrain.report.files import whole
from robusttrain.report.ledger import CONFIDENCE, UNION, wilson
from robusttrain.run_directory import SUMMARY, SWEEP_TABLE
from robusttrain.sweeps import records
from robusttrain.sweeps.records import FAILED, FINISHED, UNFINISHED, Job

SEED = "seed"
# Verdicts of an audit, from best to worst; runs of earlier versions have none.
VERDICTS = ("", "pass", "none", "warn", "fail")
# A plain bar would end the cell of the table.
BAR = r"\|"

ACCURACY = """\
Each line is a setting: the mean over its seeds ± their sample standard deviation, in percent.
*Over seeds* is a 95 % interval (Student's t) for the mean over many seeds, on the same test images.
*Over images* is a 95 % interval (Wilson's score) for the mean over many images, with the same
networks. It counts each image once, however many seeds there are."""

TESTS = """\
Each line compares two settings that differ in one key. McNemar's exact test is made for each seed,
on the same images: b is the number of images that only the first network classifies correctly, and
c the number for the second. p is the largest p of all seeds, or 1 if the seeds disagree on the
direction. It therefore tests whether the difference exists for every seed, and no image counts once
per seed. *Holm* is p corrected for all lines of the table. A winner is named only if it is below
0.05. The difference is the mean over the seeds, in points. Its 95 % interval is Student's t over
seeds or, with one seed, that of Bonett and Price over images. The test applies to the networks of
these seeds; the interval over seeds shows whether others would differ."""


class ConfidenceInterval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Figure:
    """An accuracy over seeds, as shares from 0 to 1.

    Parameters
    ----------
    mean
        The mean of the seeds.
    deviation
        Their sample standard deviation; None with a single seed.
    over_seeds
        Student's interval of the mean, with one degree of freedom less than there are seeds; None
        with a single seed.
    over_images
        Wilson's score interval (Wilson 1927) of the mean, as a share of the images of one seed. All
        seeds see the same images, so counting an image once for each seed would make the interval
        too narrow. Counting it once makes it rather too wide: a mean varies less than its seeds.
    """

    mean: float
    deviation: float | None
    over_seeds: ConfidenceInterval | None
    over_images: ConfidenceInterval


class Setting(NamedTuple):
    """Runs that differ only in their seed, by seed; and the settings that they share, by key."""

    keys: Mapping[str, str]
    runs: Mapping[str, Run]

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The measures that all of its runs have."""
        return _shared(list(self.runs.values()))

    def figure(self, measure: Measure) -> Figure:
        """The accuracy over the seeds."""
        rows: list[Any] = [run.rows[measure] for run in self.runs.values()]
        return over_seeds([row["accuracy"] for row in rows], int(rows[0]["n"]))


def over_seeds(accuracies: Sequence[float], n: int) -> Figure:
    """The figure of accuracies (shares from 0 to 1) that different seeds had on `n` images."""
    mean = fmean(accuracies)
    over_images = ConfidenceInterval(*wilson(mean * n, n))
    if len(accuracies) == 1:
        return Figure(mean, None, None, over_images)
    student = _student(accuracies)
    inside = ConfidenceInterval(max(0.0, student.low), min(1.0, student.high))
    return Figure(mean, stdev(accuracies), inside, over_images)


def settings(sweep_dir: Path, jobs: Sequence[Job]) -> list[Setting]:
    """The evaluated runs of a sweep, grouped by all varying keys except the seed."""
    keys = [key for key in records.varying(jobs) if key != SEED]
    groups: dict[tuple[str, ...], dict[str, Run]] = {}
    for job in jobs:
        group = groups.setdefault(tuple(job.settings.get(key, "") for key in keys), {})
        if records.report(sweep_dir, job):
            run = read_run(sweep_dir / job.folder)
            # A search may try a setting twice; the second run is not another seed.
            group.setdefault(str(run.clean[SEED]), run)
    return [
        Setting(dict(zip(keys, values, strict=True)), runs)
        for values, runs in groups.items()
        if runs
    ]


def pairwise(settings: Sequence[Setting]) -> pd.DataFrame:
    """Tests of settings that differ in one key: a row for each pair and each measure.

    Each seed that both have is tested with McNemar's exact test. `p` is the largest of these, or 1
    if the seeds do not all point in one direction: an intersection-union test (Berger 1982,
    Technometrics 24, 295-300) of the claim that the same network is better for every seed, which
    needs no correction for the number of seeds. `p_holm` is corrected for all rows (Holm 1979).
    `winner` is `first` or `second` if `p_holm` is below 0.05, and empty otherwise.

    Worst cases are compared only under the same norm and eps, and unions only of the same ones. A
    pair that was not evaluated on the same data, or has no seed in common, has no row.
    """
    rows = [row for a, b in combinations(settings, 2) for row in _pair(a, b)]
    if not rows:
        return pd.DataFrame()
    from statsmodels.stats.multitest import multipletests

    table = pd.DataFrame(rows)
    table["p_holm"] = multipletests(table["p"], method="holm")[1]
    better = np.where(table["difference"] > 0, "first", "second")
    table["winner"] = np.where(table["p_holm"] < SIGNIFICANT, better, "")
    return table


def write_summary(sweep_dir: Path, jobs: Sequence[Job]) -> pd.DataFrame:
    """Write `sweep.md`; returns its first table, with a line for each setting."""
    found = settings(sweep_dir, jobs)
    overview = pd.DataFrame([_overview(setting) for setting in found]).fillna("")
    parts = ["# Sweep", _counts(jobs)]
    parts += ["## Accuracy", _accuracy(found, overview)]
    parts += ["## Which settings differ", _tests(found)]
    for status, title in ((FAILED, "Failed"), (UNFINISHED, "Unfinished")):
        cells = [_ended(job, records.varying(jobs)) for job in jobs if job.status == status]
        parts += [f"## {title}", _markdown(pd.DataFrame(cells))] if cells else []
    with whole(sweep_dir / SUMMARY) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n")
    return overview


def _student(values: Sequence[float]) -> ConfidenceInterval:
    """The interval of the mean of normal values (Student 1908)."""
    from scipy.stats import t

    error = stdev(values) / math.sqrt(len(values))
    low, high = t.interval(CONFIDENCE, len(values) - 1)
    return ConfidenceInterval(fmean(values) + low * error, fmean(values) + high * error)


def _pair(a: Setting, b: Setting) -> Iterator[dict[str, Any]]:
    changed = [key for key in a.keys if a.keys[key] != b.keys[key]]
    seeds = [seed for seed in a.runs if seed in b.runs]
    if len(changed) != 1 or not seeds:
        return
    pairs = [(a.runs[seed], b.runs[seed]) for seed in seeds]
    if any(_data(first) != _data(second) for first, second in pairs):
        return
    measures = _shared([run for pair in pairs for run in pair])
    try:
        tested = pd.concat([compare(pair, measures) for pair in pairs])
    except InputError:
        # Other images under the same name: a different split, or another draw of synthetic data.
        return
    for number, title in enumerate(titles(measures).values()):
        rows = tested.iloc[number :: len(measures)]
        yield {"first": _words(a), "second": _words(b), "measure": title} | _agreed(rows)


def _shared(runs: Sequence[Run]) -> tuple[Measure, ...]:
    """The measures that all of the runs have; a union only if it is of the same threat models."""
    first = runs[0]
    if all(set(run.measures) == set(first.measures) for run in runs):
        return first.measures
    return tuple(
        measure
        for measure in first.measures
        if measure.attack != UNION and all(measure in run.rows for run in runs)
    )


def _data(run: Run) -> str:
    return str(run.clean["dataset"])


def _agreed(rows: pd.DataFrame) -> dict[str, Any]:
    """Combine the tests of all seeds."""
    differences = rows["difference"].tolist()
    one_way = min(differences) > 0 or max(differences) < 0
    first = rows.iloc[0]
    low, high = (
        _student(differences) if len(rows) > 1 else (float(first["ci_low"]), first["ci_high"])
    )
    return {
        "seeds": len(rows),
        "n": int(first["n"]),
        "difference": fmean(differences),
        "ci_low": max(-1.0, low),
        "ci_high": min(1.0, high),
        "b": rows["b"].tolist(),
        "c": rows["c"].tolist(),
        "p": rows["p"].max() if one_way else 1.0,
    }


def _counts(jobs: Sequence[Job]) -> str:
    counts = dict.fromkeys((FINISHED, FAILED, UNFINISHED), 0)
    for job in jobs:
        counts[job.status] += 1
    shares = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    noun = "job" if len(jobs) == 1 else "jobs"
    return f"{len(jobs)} {noun}: {shares}. `{SWEEP_TABLE}` has a row for each job and attack."


def _accuracy(found: Sequence[Setting], overview: pd.DataFrame) -> str:
    if overview.empty:
        return "No job has finished an evaluation."
    runs = [run for setting in found for run in setting.runs.values()]
    threats = " or ".join(dict.fromkeys(str(threat) for run in runs for threat in run.threats))
    counts = dict.fromkeys(str(len(run.label)) for run in runs)
    lines = [
        f"Worst case in {threats}, on {' or '.join(counts)} images.",
        _markdown(overview),
        ACCURACY,
    ]
    faced = suites(runs)
    if len(faced) > 1:
        lines.append(f"Warning: the runs faced different attacks: {' or '.join(faced)}.")
    return "\n\n".join(lines)


def _overview(setting: Setting) -> dict[str, str]:
    """The cells of a line of the first table."""
    cells = {**setting.keys, "seeds": str(len(setting.runs))}
    # Settings with different radii share a column if each has a single radius.
    for measure, name in titles(setting.measures).items():
        figure = setting.figure(measure)
        spread = "" if figure.deviation is None else f" ± {100 * figure.deviation:.2f}"
        cells[name] = f"{100 * figure.mean:.2f}{spread}"
        cells[f"{name}, over seeds"] = _percent(figure.over_seeds)
        cells[f"{name}, over images"] = _percent(figure.over_images)
    verdicts = {str(run.quoted.get("audit", "")) for run in setting.runs.values()}
    return cells | {"audit": max(verdicts, key=VERDICTS.index)}


def _percent(interval: ConfidenceInterval | None) -> str:
    return "" if interval is None else f"{100 * interval.low:.2f} to {100 * interval.high:.2f}"


def _tests(found: Sequence[Setting]) -> str:
    table = pairwise(found)
    if table.empty:
        return "No two settings that differ in one key were evaluated on the same images."
    cells = [_tested(row) for row in table.to_dict("records")]
    return "\n\n".join([_markdown(pd.DataFrame(cells)), TESTS])


def _tested(row: Mapping[Any, Any]) -> dict[str, str]:
    counts = zip(row["b"], row["c"], strict=True)
    return {
        "first": row["first"],
        "second": row["second"],
        "accuracy": row["measure"],
        "seeds": str(row["seeds"]),
        "difference": f"{100 * row['difference']:+.2f}",
        "95 % interval": f"{100 * row['ci_low']:+.2f} to {100 * row['ci_high']:+.2f}",
        "b, c by seed": "; ".join(f"{b}, {c}" for b, c in counts),
        "p": probability(row["p"]),
        "Holm": probability(row["p_holm"]),
        "winner": {"first": row["first"], "second": row["second"]}.get(row["winner"], ""),
    }


def _ended(job: Job, keys: Sequence[str]) -> dict[str, str]:
    cells = {"job": str(job.number)} | {key: job.settings.get(key, "") for key in keys}
    return cells | ({"error": job.error} if job.error else {})


def _words(setting: Setting) -> str:
    return " ".join(f"{key}={value}" for key, value in setting.keys.items())


def _markdown(cells: pd.DataFrame) -> str:
    rows = [list(cells.columns), ["---"] * len(cells.columns), *cells.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(cell.replace('|', BAR) for cell in row)} |" for row in rows)
