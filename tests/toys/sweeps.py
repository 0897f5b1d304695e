"""Sweeps that are written by hand: their records, and the results of their jobs."""

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from robusttrain.sweeps import records
from robusttrain.sweeps.pairs import Comparison, pairwise
from robusttrain.sweeps.records import Job
from robusttrain.sweeps.settings import settings
from robusttrain.sweeps.summary import write_summary
from toys.pages import ESCAPE, HOSTILE

N = 200
Flags = Sequence[bool] | np.ndarray


def flags(wrong: int, start: int = 0) -> np.ndarray:
    """Flags of N correct samples, except for `wrong` of them from `start` on."""
    right = np.ones(N, bool)
    right[start : start + wrong] = False
    return right


class Sweep:
    """A sweep directory that grows job by job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(
        self,
        *overrides: str,
        clean: Flags,
        worst: Flags | None = None,
        manifest: Mapping[str, object] | None = None,
        **row: object,
    ) -> Job:
        """Add a finished job that is correct where a flag is set."""
        job = Job(self.count, str(self.count), overrides, "finished", 1.5, 0.5)
        worst = clean if worst is None else worst
        place = self.folder / job.folder
        place.mkdir()
        said = dict(word.split("=", 1) for word in overrides)
        common = {"dataset": "digits", "model": "mlp", "defense": "madry", "noise": "none"}
        rows = [
            common
            | {"seed": said.get("seed", "0"), "attack": name, "norm": "linf", "eps": eps}
            | {"n": N, "accuracy": np.mean(right), "ci_low": 0.0, "ci_high": 1.0}
            | row
            for name, eps, right in (("clean", 0.0, clean), ("worst_case", 0.1, worst))
        ]
        pd.DataFrame(rows).to_csv(place / "report.csv", index=False)
        pd.DataFrame(
            {"index": range(N), "label": 1, "clean_prediction": np.asarray(clean, int)}
            | {"pgd_broken": (~np.asarray(worst)).astype(int)}
        ).to_csv(place / "samples.csv", index=False)
        if manifest is not None:
            (place / "manifest.json").write_text(json.dumps(manifest))
        job.save(self.folder)
        return job

    def fail(self, *overrides: str, error: str) -> None:
        """Add a failed job, which has nothing but its record."""
        Job(self.count, str(self.count), overrides, "failed", 0.1, error=error).save(self.folder)

    @property
    def count(self) -> int:
        return len(records.read_jobs(self.folder))

    @property
    def tests(self) -> pd.DataFrame:
        """The tests of all pairs."""
        return self.compared(Comparison())

    def compared(self, comparison: Comparison) -> pd.DataFrame:
        return pairwise(settings(self.folder, records.read_jobs(self.folder)), comparison)

    @property
    def text(self) -> str:
        """The summary with the tests of all pairs."""
        return self.summary(Comparison())

    def summary(self, comparison: Comparison) -> str:
        write_summary(self.folder, records.read_jobs(self.folder), comparison)
        return (self.folder / "sweep.md").read_text()


def studied_sweep(folder: Path) -> Sweep:
    """A sweep of two defenses, two radii and two numbers of steps; its page has every section."""
    sweep = Sweep(folder)
    for number, (defense, eps, steps, seed) in enumerate(
        product(("rt", HOSTILE + ESCAPE), ("0.1", "0.2"), (5, 10), (0, 1))
    ):
        words = (f"defense={defense}", f"eps={eps}", f"attack.steps={steps}", f"seed={seed}")
        wrong = flags(20 + 5 * number)
        sweep.add(*words, clean=flags(5), worst=wrong, eps=float(eps), audit="")
    sweep.add("defense=rt", "eps=0.3", clean=flags(3), worst=flags(9), eps=0.3, audit="fail")
    sweep.fail("defense=rt", "eps=-1", error=f"{HOSTILE} {ESCAPE}")
    return sweep
