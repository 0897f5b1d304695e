"""Measure how adversarial training under torchrun scales with processes, in images per second.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py
    OMP_NUM_THREADS=1 python benchmarks/scaling.py --processes 1 2 4 --rounds 5 -- defense=fgsm

The batch of all processes together always has the same size, so that all train the same model. Runs
take turns in each round, so that a machine that slows down affects all of them. Ratios are medians
over the rounds. The first epoch of a run is not counted. Arguments after `--` are passed to every
run.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

RUN = [
    "dataset=synthetic", "dataset.image_shape=[1,28,28]", "dataset.train_size=1024",
    "dataset.validation=0", "model=small_cnn", "defense=madry", "attack.steps=10",
    "stages=[train]", "epochs=3", "device=cpu", "training.precision=fp32",
]  # fmt: skip
IMAGES = 1024


def measure(processes: int, batch: int, overrides: list[str]) -> float:
    """Images per second of all processes together."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        keys = [*RUN, f"batch_size={batch // processes}", f"hydra.run.dir={run}", *overrides]
        command = [sys.executable, *torchrun, "-m", "robusttrain", *keys]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with (run / "train.csv").open() as file:
            seconds = [float(row["seconds"]) for row in csv.DictReader(file)][1:]
    return IMAGES * len(seconds) / sum(seconds)


def main() -> None:
    """Parse the command line, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=128, help="of all processes together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    rates: dict[int, list[float]] = {count: [] for count in asked.processes}
    for _ in range(asked.rounds):
        for count, measured in rates.items():
            measured.append(measure(count, asked.batch, asked.overrides))
    table = Table(title=f"{asked.rounds} rounds", title_justify="left")
    for column in ("processes", "images/s", f"ratio to {asked.processes[0]}"):
        table.add_column(column, justify="right")
    for count, measured in rates.items():
        ratios = [a / b for a, b in zip(measured, rates[asked.processes[0]], strict=True)]
        rate, ratio = statistics.median(measured), statistics.median(ratios)
        table.add_row(str(count), f"{rate:.0f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
