"""Natural against proven accuracy of the methods that train on bounds; write the table.

    python benchmarks/certified.py --runs runs --data-dir data --resume

MNIST at linf 0.1, `experiment=mnist_certified`, with fewer epochs so that a training takes about
ten minutes on two cores. Each point is a method with one weight. The figures are those of all test
images, proven by intervals alone. `--resume` keeps the runs that `--runs` has already; without it a
directory with runs is refused. The CSV file and the table in `docs/certified.md` are written after
each point, with the points that are done.
"""

import argparse
import csv
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from manual_pages import END, markdown, replace_between

import robusttrain as rt
from robusttrain.run_directory import MANIFEST, REPORT

PAGE = Path(__file__).parents[1] / "docs" / "certified.md"
START = "<!-- benchmarks/certified.py -->"

COLUMNS = ["defense", "settings", "clean", "attacked", "proven"]

# The attacks of the later papers take one to eight steps; these take as many as ten minutes allow.
STEPS = ["attack.steps=3"]

RECIPE = ["experiment=mnist_certified", "eps=0.1", "evaluation.audit=false", "report=none"]


class Point(NamedTuple):
    """A method with its weight, and its epochs, which depend on the cost of a step."""

    defense: str
    words: list[str]
    epochs: int


def on_images(defense: str, weight: float) -> Point:
    """A method that mixes adversarial images and bounds with a constant weight."""
    words = [f"defense.weight={weight}", "defense.weight_warmup=false", *STEPS]
    return Point(defense, words, 2)


POINTS = [
    Point("ibp", ["defense.weight=1.0", "defense.weight_warmup=false"], 4),
    Point("ibp", ["defense.weight=0.5"], 3),
    *(on_images("mtl_ibp", weight) for weight in (0.5, 0.1, 0.02)),
    *(on_images("cc_ibp", weight) for weight in (0.5, 0.1, 0.02)),
    *(on_images("exp_ibp", weight) for weight in (0.5, 0.1)),
    *(Point("sabr", [f"defense.box_share={share}", *STEPS], 2) for share in (0.8, 0.4)),
]


def command(point: Point, more: Sequence[str] = ()) -> list[str]:
    """The words that train and evaluate a point."""
    return [*RECIPE, f"defense={point.defense}", f"epochs={point.epochs}", *point.words, *more]


def directory(point: Point, runs: Path) -> Path:
    """Where a point is trained."""
    values = [word.rpartition("=")[2] for word in point.words if word.startswith("defense.")]
    return runs / "_".join([point.defense, values[0]])


def is_done(point: Point, runs: Path) -> bool:
    """Whether a point has its figures."""
    return (directory(point, runs) / MANIFEST).is_file()


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
    rows = [figures(point, runs) for point in POINTS if is_done(point, runs)]
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
    parser.add_argument("--resume", action="store_true", help="keep the runs that are there")
    parser.add_argument("--more", nargs="*", default=[], help="further words for each run")
    given = parser.parse_args(words)
    done = [point for point in POINTS if is_done(point, given.runs)]
    if done and not given.resume:
        parser.error(f"{given.runs} has runs already: add --resume, or choose another --runs")
    given.runs.mkdir(parents=True, exist_ok=True)
    more = [f"data_dir={given.data_dir}", *given.more]
    for point in POINTS:
        if point not in done:
            run = f"hydra.run.dir={directory(point, given.runs)}"
            rt.run(*command(point, more), run, progress=False)
        write(given.runs, target)


if __name__ == "__main__":
    main()
