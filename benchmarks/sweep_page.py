"""How long the page of a sweep takes: python benchmarks/sweep_page.py

Writes a sweep of 200 jobs by hand (4 defenses in 5 widths, 10 seeds, 1,000 images), makes its page
as `robusttrain report` does, and prints CPU seconds for each part. All pairs of settings are
tested, and all pairs that differ in one key.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from robusttrain.sweeps import records
from robusttrain.sweeps.pairs import Comparison, pairwise
from robusttrain.sweeps.records import Job
from robusttrain.sweeps.settings import settings
from robusttrain.sweeps.sweep_page import write_page

DEFENSES, WIDTHS = ("standard", "fgsm_rs", "madry", "trades"), (8, 16, 32, 64, 128)
SEEDS, IMAGES, EPS = 10, 1000, 0.1


def write_jobs(folder: Path) -> None:
    """Write the records and the results of all jobs."""
    generator = np.random.default_rng(0)
    for number, (defense, width, seed) in enumerate(product(DEFENSES, WIDTHS, range(SEEDS))):
        skill = 0.8 + 0.03 * DEFENSES.index(defense) + 0.02 * WIDTHS.index(width)
        clean = generator.random(IMAGES) < skill
        worst = clean & (generator.random(IMAGES) < skill)
        words = (f"defense={defense}", f"model.width={width}", f"seed={seed}")
        Job(number, str(number), words, records.FINISHED, 60.0, 0.5).save(folder)
        write_run(folder / str(number), clean, worst, seed)


def write_run(place: Path, clean: np.ndarray, worst: np.ndarray, seed: int) -> None:
    """Write the tables of one job."""
    place.mkdir()
    common = {"dataset": "digits", "model": "mlp", "defense": "", "noise": "none"}
    rows = [
        common
        | {"seed": seed, "attack": attack, "norm": "linf", "eps": radius, "n": IMAGES}
        | {"accuracy": right.mean(), "ci_low": 0.0, "ci_high": 1.0, "audit": "pass"}
        for attack, radius, right in (("clean", 0.0, clean), ("worst_case", EPS, worst))
    ]
    pd.DataFrame(rows).to_csv(place / "report.csv", index=False)
    samples = {"index": range(IMAGES), "label": 1, "clean_prediction": clean.astype(int)}
    pd.DataFrame(samples | {"pgd_broken": (~worst).astype(int)}).to_csv(
        place / "samples.csv", index=False
    )


@contextmanager
def clocked(part: str) -> Iterator[None]:
    """Print the CPU seconds that the block takes."""
    started = time.process_time()
    yield
    print(f"{part:<24}{time.process_time() - started:6.2f} s")


def main() -> None:
    """Print the CPU seconds of each part, and of all."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jobs(folder)
        with clocked("all"):
            with clocked("records"):
                jobs = records.read_jobs(folder)
            with clocked("runs"):
                found = settings(folder, jobs)
            with clocked("chosen tests"):
                compared = pairwise(found, Comparison())
            with clocked("page, with all pairs"):
                write_page(folder, jobs, found, compared, Comparison())
        if len(sys.argv) > 1:
            Path(sys.argv[1]).write_bytes((folder / "sweep.html").read_bytes())


if __name__ == "__main__":
    main()
