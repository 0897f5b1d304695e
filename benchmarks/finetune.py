"""Harden a network on few images of other classes than those it was trained on; write the table.

    python benchmarks/finetune.py --runs runs --data-dir data --seeds 0 1 2

The images are those of MNIST. Two networks are trained on the digits 0 to 4, one of them against
PGD; each is then fine-tuned on a few images of 5 to 9, as is a network without any training. The
table goes to `docs/guides/finetune.md`, with the commands. Trainings that `--runs` has already are
not repeated, and the page is written after each line, with the lines that are done. The table takes
some minutes of CPU time for each seed. A second table has heads on features that were hardened
without labels.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from manual_pages import END, markdown, replace_between

import robusttrain as rt
from robusttrain.data.torchvision import Torchvision
from robusttrain.run_directory import MANIFEST, REPORT

PAGE = Path(__file__).parents[1] / "docs" / "guides" / "finetune.md"
START = "<!-- benchmarks/finetune.py -->"
FARE_START, FARE_END = "<!-- fare: benchmarks/finetune.py -->", "<!-- end of fare -->"

# The first class and the training images of each data set; `unlabelled` has labels, which are not
# read.
HALVES = {"first": (0, 10_000), "second": (5, 200), "unlabelled": (5, 10_000)}

NETWORK = ["dataset=arrays", "model=small_cnn", "model.width=8"]

FIRST = [*NETWORK, "dataset.train=first.npz", "stages=[train]"]

GROWING = ["training.curriculum.eps_warmup=0.6", "training.curriculum.per_batch=true"]

FARE = [
    *NETWORK, "defense=fare", "dataset.validation=0", "eps=0.1", "attack.steps=5", "stages=[train]",
    "optimizer.lr=0.01", *GROWING,
]  # fmt: skip

STARTS = {
    "standard": [*FIRST, "defense=standard", "epochs=4", "optimizer.lr=0.003"],
    "robust": [
        *FIRST, "defense=madry", "eps=0.1", "attack.steps=5", "epochs=4", "optimizer.lr=0.01",
        *GROWING,
    ],
    "fare200": [
        *FARE, "dataset.train=second.npz", "epochs=20", "batch_size=50", "averaging=ema",
        "schedule=cosine", "schedule.warmup=0.1",
    ],
    "fare10k": [*FARE, "dataset.train=unlabelled.npz", "epochs=4"],
}  # fmt: skip

SECOND = [
    "experiment=finetune", *NETWORK, "dataset.train=second.npz", "dataset.validation=0", "eps=0.1",
    "attack.steps=5", "epochs=20", "batch_size=50", "optimizer.lr=0.01", "evaluation=fast",
    "evaluation.first=500", "evaluation.audit=false", "report=none",
]  # fmt: skip

AT_ONCE = ["training.curriculum.eps_warmup=0"]


class Line(NamedTuple):
    """A line of the table: the first weights, and the words that are added to `SECOND`."""

    start: str
    words: list[str]


LINES = [
    Line("random", []),
    Line("standard", []),
    Line("standard", AT_ONCE),
    Line("standard", ["training.trainable=head"]),
    Line("robust", []),
    Line("standard", ["training.trainable=last:1"]),
    Line("robust", ["training.trainable=head"]),
    Line("random", AT_ONCE),
    Line("robust", ["training.trainable=last:1"]),
    Line("standard", ["optimizer.lr=0.003"]),
    Line("standard", ["optimizer.layer_decay=0.5"]),
    Line("standard", ["averaging=none"]),
]


HEAD = ["training.trainable=head"]

PROBES = [
    Line(start, [*HEAD, *more])
    for more in ([], ["defense=standard"])
    for start in ("standard", "fare200", "fare10k")
]


def write_halves(data_dir: str) -> None:
    """Write the digits 0 to 4 and 5 to 9 as data sets of five classes each."""
    splits = Torchvision("mnist", data_dir=data_dir, download=False).load()
    for half, (first_class, count) in HALVES.items():
        arrays = {}
        for name, split in zip(("train", "test"), splits, strict=True):
            images, labels = split.images.numpy(), split.labels.numpy() - first_class
            rows = np.flatnonzero((labels >= 0) & (labels < 5))
            rows = rows[:count] if name == "train" else rows
            arrays |= {f"x_{name}": images[rows], f"y_{name}": labels[rows]}
        np.savez_compressed(f"{half}.npz", **arrays)


def robusttrain(words: Sequence[str], run: Path) -> None:
    """Run a command line in this process, unless its run is there."""
    if not (run / MANIFEST).is_file():
        rt.run(*words, f"hydra.run.dir={run}", progress=False)


def command(line: Line, runs: Path) -> list[str]:
    """The words that train a line, without its seed."""
    weights = [] if line.start == "random" else [f"model.weights={runs / line.start}"]
    changed = {word.partition("=")[0] for word in line.words}
    if "defense" in changed:
        # Standard training has no attack.
        changed.add("attack.steps")
    kept = [word for word in SECOND if word.partition("=")[0] not in changed]
    return [*kept, *weights, *line.words]


def directory(line: Line, seed: int, runs: Path) -> Path:
    """Where a line is trained."""
    changed = "_".join(word.rpartition(".")[2].replace("=", "-") for word in line.words)
    return runs / f"{line.start}_{changed or 'recipe'}_{seed}".replace(":", "-")


def cells(line: Line, seeds: Sequence[int], runs: Path) -> list[str]:
    """The cells of a line: means over the seeds, and the lowest and the highest figure."""
    reports = [pd.read_csv(directory(line, seed, runs) / REPORT) for seed in seeds]
    figures = [100 * report.set_index("attack")["accuracy"] for report in reports]
    found = []
    for name in ("clean", "worst_case"):
        values = [figure[name] for figure in figures]
        spread = f" ({min(values):.1f} to {max(values):.1f})" if len(seeds) > 1 else ""
        found.append(f"{np.mean(values):.1f}{spread}")
    changes = " ".join(f"`{word}`" for word in line.words)
    return [line.start, changes or "none", *found]


def start(name: str, runs: Path) -> list[str]:
    """The words that train the weights of a start."""
    weights = [f"model.weights={runs / 'standard'}"] if name.startswith("fare") else []
    return [*STARTS[name], *weights, f"hydra.run.dir={runs / name}"]


def table(lines: Sequence[Line], seeds: Sequence[int], runs: Path) -> str:
    """The lines that are done, as Markdown."""
    header = ["weights at the start", "changes to the command below", "clean, %", "worst case, %"]
    done = [
        line
        for line in lines
        if all((directory(line, seed, runs) / MANIFEST).is_file() for seed in seeds)
    ]
    text = markdown([header, *(cells(line, seeds, runs) for line in done)])
    number = "one seed" if len(seeds) == 1 else f"means over {len(seeds)} seeds (range)"
    return f"{text}\n\nFigures: {number}."


def page(lines: Sequence[Line], starts: Sequence[str], seeds: Sequence[int], runs: Path) -> str:
    """The table of `lines`, and the commands of what is before them, as Markdown."""
    commands = [(f"before, `{name}`", start(name, runs)) for name in starts]
    first = lines[1].start
    recipe = [*command(Line(first, []), runs), f"seed={seeds[0]}"]
    commands.append((f"the command, from `{first}`", recipe))
    shown = [[what, f"`{shlex.join(['robusttrain', *words])}`"] for what, words in commands]
    return f"{table(lines, seeds, runs)}\n\n{markdown([['training', 'command'], *shown])}"


def main() -> None:
    """Parse the command line, train what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="directory of the runs")
    parser.add_argument("--data-dir", default="data", help="directory of MNIST")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    write_halves(given.data_dir)
    for name in STARTS:
        robusttrain(start(name, given.runs), given.runs / name)
    for line in [*LINES, *PROBES]:
        for seed in given.seeds:
            words = [*command(line, given.runs), f"seed={seed}"]
            robusttrain(words, directory(line, seed, given.runs))
        write_page(given.seeds, given.runs)


def write_page(seeds: Sequence[int], runs: Path) -> None:
    """Replace what is between the markers of the page."""
    tables = {
        (START, END): page(LINES, ["standard", "robust"], seeds, runs),
        (FARE_START, FARE_END): page(PROBES, ["fare200", "fare10k"], seeds, runs),
    }
    for (start_mark, end_mark), text in tables.items():
        replace_between(PAGE, start_mark, end_mark, text)


if __name__ == "__main__":
    main()
