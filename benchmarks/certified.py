"""Natural against proven accuracy of the methods that train on bounds; write the table.

    python benchmarks/certified.py --runs runs --data-dir data --jobs 2 --resume

MNIST at linf 0.1, `experiment=mnist_certified`, with a smaller network without the layer of
contrast, and fewer epochs, so that a point takes less than ten minutes on one core. Each point is a
method with one weight. The figures are those of all test images, proven by intervals alone.
`--jobs` points are trained at a time, each with one thread. `--resume` keeps the points that
`--runs` has already; without it a directory with points is refused. The CSV file and the table in
`docs/certified.md` are written at the end.
"""

import argparse
import csv
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from manual_pages import END, markdown, replace_between
from rich.progress import track

from robusttrain.run_directory import MANIFEST, REPORT

PAGE = Path(__file__).parents[1] / "docs" / "certified.md"
START = "<!-- benchmarks/certified.py -->"

COLUMNS = ["defense", "settings", "clean", "attacked", "proven"]

RECIPE = ["experiment=mnist_certified", "eps=0.1"]

# The small network of Wong et al. 2018, with BatchNorm. It has no layer of contrast, since the
# methods are compared as published.
NETWORK = [
    "model.channels=[16,32]", "model.strides=[2,2]", "model.hidden=[100]", "model.contrast=1",
]  # fmt: skip

SHORT = ["epochs=4", "evaluation.audit=false"]

# The attacks of the later papers take one to eight steps.
STEPS = ["attack.steps=3"]


class Point(NamedTuple):
    """A method and the words of its weight; the first of them names its directory."""

    defense: str
    words: list[str]


def on_images(defense: str, weight: float) -> Point:
    """A method that mixes adversarial images and bounds with a constant weight."""
    words = [f"defense.weight={weight}", "defense.weight_warmup=false", *STEPS]
    return Point(defense, words)


POINTS = [
    Point("ibp", ["defense.weight=1.0", "defense.weight_warmup=false"]),
    Point("ibp", ["defense.weight=0.5"]),
    *(on_images("mtl_ibp", weight) for weight in (0.5, 0.1, 0.02)),
    *(on_images("cc_ibp", weight) for weight in (0.5, 0.1, 0.02)),
    *(on_images("exp_ibp", weight) for weight in (0.5, 0.1)),
    *(Point("sabr", [f"defense.box_share={share}", *STEPS]) for share in (0.8, 0.4)),
]


def command(point: Point) -> list[str]:
    """The words that train and evaluate a point."""
    return [*RECIPE, *NETWORK, *SHORT, f"defense={point.defense}", *point.words]


def directory(point: Point, runs: Path) -> Path:
    """Where a point is trained."""
    return runs / f"{point.defense}_{point.words[0].rpartition('=')[2]}"


def is_done(point: Point, runs: Path) -> bool:
    """Whether a point has its figures."""
    return (directory(point, runs) / MANIFEST).is_file()


def train(point: Point, runs: Path, more: Sequence[str]) -> None:
    """Train and evaluate a point in a process with one thread."""
    place = f"hydra.run.dir={directory(point, runs)}"
    words = [*command(point), "verbosity=quiet", "report=none", place, *more]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "robusttrain", *words], check=True, env=one_thread)


def figures(point: Point, runs: Path) -> dict[str, str]:
    """The row of a point; accuracies in %."""
    accuracy = pd.read_csv(directory(point, runs) / REPORT).set_index("attack")["accuracy"]
    names = {"clean": "clean", "attacked": "worst_case", "proven": "verified"}
    found = {column: f"{100 * accuracy[name]:.2f}" for column, name in names.items()}
    settings = [word for word in point.words if word not in STEPS]
    return {"defense": point.defense, "settings": " ".join(settings), **found}


def page(rows: Sequence[dict[str, str]]) -> str:
    """The table and the command, as Markdown."""
    header = ["defense", "settings", "clean, %", "worst case, %", "proven, %"]
    lines = [header]
    for row in rows:
        code = " ".join(f"`{word}`" for word in row["settings"].split())
        lines.append([f"`{row['defense']}`", code, row["clean"], row["attacked"], row["proven"]])
    example = shlex.join(["robusttrain", *command(POINTS[0])])
    return f"{markdown(lines)}\n\nThe first line is that of `{example}`. One seed."


def write(runs: Path, target: Path) -> None:
    """Write the CSV file, and replace what is between the markers of the page `target`."""
    rows = [figures(point, runs) for point in POINTS]
    with (runs / "certified.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    replace_between(target, START, END, page(rows))


def main(words: Sequence[str] | None = None, target: Path = PAGE) -> None:
    """Parse the command line, train what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="directory of the runs")
    parser.add_argument("--data-dir", default="data", help="directory of MNIST")
    parser.add_argument("--jobs", type=int, default=1, help="points that are trained at a time")
    parser.add_argument("--resume", action="store_true", help="keep the points that are there")
    parser.add_argument("--more", nargs="*", default=[], help="further words for each run")
    given = parser.parse_args(words)
    missing = [point for point in POINTS if not is_done(point, given.runs)]
    if len(missing) < len(POINTS) and not given.resume:
        parser.error(f"{given.runs} has points already: add --resume, or choose another --runs")
    given.runs.mkdir(parents=True, exist_ok=True)
    more = [f"data_dir={given.data_dir}", *given.more]
    with ThreadPoolExecutor(given.jobs) as pool:
        trained = pool.map(partial(train, runs=given.runs, more=more), missing)
        list(track(trained, "training", len(missing)))
    write(given.runs, target)


if __name__ == "__main__":
    main()
