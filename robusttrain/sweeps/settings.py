"""The settings of a sweep: its runs, grouped over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from robusttrain.report.compare import Measure, Run, read_run, shared
from robusttrain.report.ledger import CONFIDENCE, wilson
from robusttrain.sweeps import records
from robusttrain.sweeps.records import Job
from robusttrain.sweeps.trained import CHECKPOINT, SEED, seed_key


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
    """Runs that differ only in their seed, by seed; and the settings that they share, by key.

    Settings may have different keys: a key that only belongs to one option is missing elsewhere.
    """

    keys: Mapping[str, str]
    runs: Mapping[str, Run]

    @property
    def words(self) -> str:
        """Its keys with their values, as tables name it."""
        return " ".join(f"{key}={value}" for key, value in self.keys.items())

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The measures that all of its runs have."""
        return shared(list(self.runs.values()))

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
    low, high = student(accuracies)
    inside = ConfidenceInterval(max(0.0, low), min(1.0, high))
    return Figure(mean, stdev(accuracies), inside, over_images)


def settings(sweep_dir: Path, jobs: Sequence[Job]) -> list[Setting]:
    """The evaluated runs of a sweep, grouped by all varying keys except the seed.

    Models that were trained before are grouped by what distinguishes their trainings, and by the
    seeds of these if they differ.
    """
    models = records.trained(sweep_dir, jobs)
    seeds = seed_key(models)
    keys = [key for key in records.varying(jobs) if not models or key != CHECKPOINT]
    groups: dict[tuple[tuple[str, str], ...], dict[str, Run]] = {}
    for job in jobs:
        if records.report(sweep_dir, job):
            model = models.get(job.folder, {})
            run = read_run(sweep_dir / job.folder)
            cells = model | {key: job.settings.get(key, "") for key in keys}
            setting = tuple((key, value) for key, value in cells.items() if key != seeds)
            # A search may try a setting twice; the second run is not another seed.
            groups.setdefault(setting, {}).setdefault(model.get(seeds, str(run.clean[SEED])), run)
    return [Setting(dict(setting), runs) for setting, runs in groups.items()]


def student(values: Sequence[float]) -> ConfidenceInterval:
    """The interval of the mean of normal values (Student 1908)."""
    from scipy.stats import t

    error = stdev(values) / math.sqrt(len(values))
    low, high = t.interval(CONFIDENCE, len(values) - 1)
    return ConfidenceInterval(fmean(values) + low * error, fmean(values) + high * error)
