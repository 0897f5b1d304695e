"""Training for one norm and for several, under attacks in all of them; write the table.

    python benchmarks/threats.py --runs runs --data-dir data --resume

MNIST within linf 0.3, l2 2 and l1 10 (Maini et al. 2020). Each line is a training of `small_cnn` by
`experiment=mnist`, and two evaluations on the first 1,000 test images: by `evaluation=pgd50_10`, of
which PGD with 10 restarts breaks most, and by `evaluation=fast`. `--resume`
keeps the runs that `--runs` has already; without it a directory with runs is refused. The table in
`docs/guides/threats.md` is written after each line, with the lines that are done.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from manual_pages import END, markdown, replace_between

import robusttrain as rt
from robusttrain.run_directory import MANIFEST, REPORT

PAGE = Path(__file__).parents[1] / "docs" / "guides" / "threats.md"
START = "<!-- benchmarks/threats.py -->"

THREATS = "threats={linf: 0.3, l2: 2, l1: 10}"
NORMS = ["linf", "l2", "l1"]

RECIPE = ["experiment=mnist", THREATS, "stages=[train]"]

ON_IMAGES = ["evaluation.first=1000", "evaluation.audit=false"]

WEAK, STRONG = "pgd50_10", "fast"


class Line(NamedTuple):
    """A method, its words, and the published accuracy under all attacks, in %.

    `steps` are those of its attack, or of the one inside of it.
    """

    name: str
    words: list[str]
    published: str
    steps: str = "attack.steps=10"


# The figures of Maini et al. 2020, in the README of their repository, robust_union.
LINES = [
    Line("PGD-AT in linf", ["defense=madry", "norm=linf"], "3.7"),
    Line("PGD-AT in l2", ["defense=madry", "norm=l2"], "0.4"),
    Line("PGD-AT in l1", ["defense=madry", "norm=l1"], "0.0"),
    Line("E-AT", ["defense=eat"], ""),
    Line("MSD", ["defense=madry", "attack=msd"], "58.4"),
    Line("MAX", ["defense=madry", "attack=max"], "42.1", "attack.attack.steps=10"),
    Line("AVG", ["defense=avg"], "34.9"),
]


def training(line: Line) -> list[str]:
    """The words that train a line."""
    return [*RECIPE, *line.words, line.steps]


def evaluation(run: Path, suite: str) -> list[str]:
    """The words that evaluate a run."""
    words = ["stages=[evaluate]", f"checkpoint={run}", "dataset=mnist", THREATS]
    return [*words, f"evaluation={suite}", *ON_IMAGES]


def directory(line: Line, runs: Path) -> Path:
    """Where a line is trained."""
    return runs / "-".join(word.rpartition("=")[2] for word in line.words)


def evaluated(line: Line, runs: Path, suite: str) -> Path:
    """Where a line is evaluated."""
    return directory(line, runs).with_suffix(f".{suite}")


def is_done(line: Line, runs: Path) -> bool:
    """Whether a line has its figures."""
    return all((evaluated(line, runs, suite) / MANIFEST).is_file() for suite in (WEAK, STRONG))


def figures(run: Path) -> dict[str, str]:
    """Clean accuracy, the worst case in each norm, and the union, in %."""
    report = pd.read_csv(run / REPORT)
    worst = report[report["attack"] == "worst_case"].set_index("norm")["accuracy"]
    others = report.set_index("attack")["accuracy"]
    found = {"clean": others["clean"], **worst, "union": others["union"]}
    return {name: f"{100 * float(value):.1f}" for name, value in found.items()}


def table(runs: Path) -> str:
    """The lines that are done, as Markdown."""
    header = ["trained by", "words", "clean", *NORMS, "union", "published union"]
    lines = [header]
    for line in LINES:
        if is_done(line, runs):
            weak, strong = (figures(evaluated(line, runs, suite)) for suite in (WEAK, STRONG))
            words = " ".join(f"`{word}`" for word in line.words)
            shown = [f"{strong[name]} ({weak[name]})" for name in (*NORMS, "union")]
            lines.append([line.name, words, strong["clean"], *shown, line.published])
    return markdown(lines)


def page(runs: Path) -> str:
    """The table, and the commands of its first line, as Markdown."""
    run = Path("RUN")
    words = {
        "training": training(LINES[0]),
        f"attacks of `{STRONG}`": evaluation(run, STRONG),
        f"attacks of `{WEAK}`": evaluation(run, WEAK),
    }
    commands = [[what, f"`{shlex.join(['robusttrain', *each])}`"] for what, each in words.items()]
    return (
        f"{table(runs)}\n\nAccuracies in %, one seed; in brackets those under `{WEAK}`. The first "
        "line is that of these commands, with the run of the first one as `RUN`:\n\n"
        f"{markdown([['what', 'command'], *commands])}"
    )


def write(runs: Path, target: Path) -> None:
    """Replace what is between the markers of the page `target`."""
    replace_between(target, START, END, page(runs))


def main(words: Sequence[str] | None = None, target: Path = PAGE) -> None:
    """Parse the command line, train what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="directory of the runs")
    parser.add_argument("--data-dir", default="data", help="directory of MNIST")
    parser.add_argument("--resume", action="store_true", help="keep the runs that are there")
    parser.add_argument("--more", nargs="*", default=[], help="further words for each command")
    given = parser.parse_args(words)
    if not given.resume and any(is_done(line, given.runs) for line in LINES):
        parser.error(f"{given.runs} has runs already: add --resume, or choose another --runs")

    def run(words: Sequence[str], to: Path) -> None:
        if not (to / MANIFEST).is_file():
            more = [f"data_dir={given.data_dir}", "report=none", *given.more]
            rt.run(*words, *more, f"hydra.run.dir={to}", progress=False)

    for line in LINES:
        trained = directory(line, given.runs)
        run(training(line), trained)
        for suite in (WEAK, STRONG):
            run(evaluation(trained, suite), evaluated(line, given.runs, suite))
        write(given.runs, target)


if __name__ == "__main__":
    main()
