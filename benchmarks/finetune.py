"""Harden a network on few images of other classes than those it was trained on; write the table.

    python benchmarks/finetune.py --runs runs --data-dir data --seeds 0 1 2

The images are those of MNIST. Two networks are trained on the digits 0 to 4, one of them against
PGD; each is then fine-tuned on a few images of 5 to 9, as is a network without any training. The
table goes to `docs/guides/finetune.md`, with the commands. Trainings that `--runs` has already are
not repeated, and the page is written after each line, with the lines that are done. The table takes
some minutes of CPU time for each seed.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

import robusttrain as rt
from robusttrain.data.torchvision import Torchvision
from robusttrain.run_directory import MANIFEST, REPORT

PAGE = Path(__file__).parents[1] / "docs" / "guides" / "finetune.md"
START, END = "<!-- benchmarks/finetune.py -->", "<!-- end -->"

# Training images of each half.
IMAGES = {"first": 10_000, "second": 200}

NETWORK = ["dataset=arrays", "model=small_cnn", "model.width=8"]

FIRST = [*NETWORK, "dataset.train=first.npz", "stages=[train]"]

GROWING = ["training.curriculum.eps_warmup=0.6", "training.curriculum.per_batch=true"]

STARTS = {
    "standard": [*FIRST, "defense=standard", "epochs=4", "optimizer.lr=0.003"],
    "robust": [
        *FIRST, "defense=madry", "eps=0.1", "attack.steps=5", "epochs=4", "optimizer.lr=0.01",
        *GROWING,
    ],
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


def write_halves(data_dir: str) -> None:
    """Write the digits 0 to 4 and 5 to 9 as two data sets of five classes each."""
    splits = Torchvision("mnist", data_dir=data_dir, download=False).load()
    for half, first_class in (("first", 0), ("second", 5)):
        arrays = {}
        for name, split in zip(("train", "test"), splits, strict=True):
            images, labels = split.images.numpy(), split.labels.numpy() - first_class
            rows = np.flatnonzero((labels >= 0) & (labels < 5))
            rows = rows[: IMAGES[half]] if name == "train" else rows
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


def page(seeds: Sequence[int], runs: Path) -> str:
    """The table and the commands, as Markdown."""
    header = ["weights at the start", "changes to the command below", "clean, %", "worst case, %"]
    done = [
        line
        for line in LINES
        if all((directory(line, seed, runs) / MANIFEST).is_file() for seed in seeds)
    ]
    rows = [header, ["---"] * len(header), *(cells(line, seeds, runs) for line in done)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    recipe = [*command(Line("standard", []), runs), f"seed={seeds[0]}"]
    commands = [
        ("before, `standard`", [*STARTS["standard"], f"hydra.run.dir={runs / 'standard'}"]),
        ("before, `robust`", [*STARTS["robust"], f"hydra.run.dir={runs / 'robust'}"]),
        ("the command, from `standard`", recipe),
    ]
    text = "\n".join(
        f"| {what} | `{shlex.join(['robusttrain', *words])}` |" for what, words in commands
    )
    number = "one seed" if len(seeds) == 1 else f"means over {len(seeds)} seeds (range)"
    return f"{table}\n\nFigures: {number}.\n\n| training | command |\n| --- | --- |\n{text}"


def main() -> None:
    """Parse the command line, train what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="directory of the runs")
    parser.add_argument("--data-dir", default="data", help="directory of MNIST")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    write_halves(given.data_dir)
    for name, words in STARTS.items():
        robusttrain(words, given.runs / name)
    for line in LINES:
        for seed in given.seeds:
            words = [*command(line, given.runs), f"seed={seed}"]
            robusttrain(words, directory(line, seed, given.runs))
        write_page(given.seeds, given.runs)


def write_page(seeds: Sequence[int], runs: Path) -> None:
    """Replace what is between the markers of the page."""
    before, _, rest = PAGE.read_text().partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{START}\n\n{page(seeds, runs)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
