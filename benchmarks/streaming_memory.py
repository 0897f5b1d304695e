"""Measure memory and time of an epoch on an image folder, streamed and in memory (Linux only).

    python benchmarks/streaming_memory.py
    python benchmarks/streaming_memory.py --images 40000 --workers 0 2

The benchmark creates a folder of JPEG files and trains on it with the command line: once with
`dataset.stream=false`, and once for each number of workers. Meanwhile it reads the memory of the
process and of all its workers from /proc, many times a second. There is no validation, since the
memory of an attack depends on the number of attacked images. The columns are

  main     peak of the main process: its resident set (RSS), including libraries
  worker   peak of a worker: its private memory, without what it shares with others
  all      peak of all processes together: own and shared data (PSS), without libraries
  extra    `all` minus that of a run on 20,000 such images: the cost of the number of images
  epoch    seconds of the epoch, from train.csv
"""

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

CLASSES, FEW = 10, 20_000
SETTINGS = (
    "dataset=folder", "model=mlp", "defense=standard", "epochs=1", "batch_size=128",
    "stages=[train]", "dataset.validation=0", "device=cpu", "training.precision=fp32",
)  # fmt: skip


FIELDS = ("Rss", "Private_Clean", "Private_Dirty", "Pss_Anon", "Pss_Shmem")


class Peak(NamedTuple):
    """The peak of each kind of memory, in bytes, and the seconds of the epoch."""

    main: float
    worker: float
    everything: float
    epoch: float


def generate(folder: Path, count: int, size: int) -> None:
    """Write `count` smooth coloured pictures of `size` x `size` pixels, in a folder per class."""
    generator = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
    for number in range(count):
        coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((size, size), Image.Resampling.BILINEAR)
        picture.save(folder / f"class{number % CLASSES}" / f"{number:07}.jpg", quality=85)


def watch(command: list[str], results: Path) -> Peak:
    """Run a training, and read the memory of its processes until it ends."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    everything = main = worker = 0.0
    before: set[int] = set()
    while process.poll() is None:
        now = set(_children(process.pid))
        # A process that is seen only once is no worker, but for example git.
        children = [_memory(child) for child in now & before]
        before = now
        parent = _memory(process.pid)
        everything = max(everything, sum(_data(each) for each in [parent, *children]))
        main = max(main, parent["Rss"])
        worker = max([worker, *(c["Private_Clean"] + c["Private_Dirty"] for c in children)])
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    with (results / "train.csv").open() as file:
        (epoch,) = csv.DictReader(file)
    return Peak(main, worker, everything, float(epoch["seconds"]))


def _children(pid: int) -> list[int]:
    try:
        tasks = Path(f"/proc/{pid}/task").glob("*/children")
        return [int(word) for task in tasks for word in task.read_text().split()]
    except OSError:
        return []


def _data(memory: dict[str, float]) -> float:
    return memory["Pss_Anon"] + memory["Pss_Shmem"]


def _memory(pid: int) -> dict[str, float]:
    """Fields of /proc/PID/smaps_rollup, in bytes; zeros for a process that has ended."""
    nothing = dict.fromkeys(FIELDS, 0.0)
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return nothing
    fields = (line.split() for line in lines)
    return nothing | {name.rstrip(":"): 1024 * float(value) for name, value, _ in fields}


def measure(data: Path, stream: bool, workers: int) -> Peak:
    """Measure one epoch in fresh processes."""
    with tempfile.TemporaryDirectory() as results:
        settings = (
            f"dataset.path={data}",
            f"dataset.stream={stream}",
            f"dataset.workers={workers}",
            f"hydra.run.dir={results}",
        )
        command = [sys.executable, "-m", "robusttrain", *SETTINGS, *settings]
        return watch(command, Path(results))


def main() -> None:
    """Parse the command line, generate, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=64, help="pixels per side")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument(
        "--data", type=Path, help="directory that keeps the images for the next time"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.data or Path(temporary)
        data, few = (root / f"{n}x{arguments.size}" for n in (arguments.images, FEW))
        for folder, count in ((data, arguments.images), (few, FEW)):
            if not folder.is_dir():
                generate(folder, count, arguments.size)
        compare(data, few, arguments)


def compare(data: Path, few: Path, arguments: argparse.Namespace) -> None:
    """Measure every way to hold the images, and print the table."""
    decoded = arguments.images * 3 * arguments.size**2
    title = f"{arguments.images:,} images, {decoded / 1e6:,.0f} MB decoded; memory in MB"
    table = Table(title=title, title_justify="left")
    table.add_column("images")
    for column in ("main", "worker", "all", "extra", "epoch s"):
        table.add_column(column, justify="right")
    for stream, workers in [(False, 0), *((True, number) for number in arguments.workers)]:
        least, most = (measure(folder, stream, workers) for folder in (few, data))
        extra = most.everything - least.everything
        memory = (most.main, most.worker, most.everything, extra)
        table.add_row(
            f"streamed, {workers} workers" if stream else "in memory",
            *(f"{value / 1e6:,.0f}" for value in memory),
            f"{most.epoch:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
