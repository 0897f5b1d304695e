"""Make the reference models in `robusttrain/pretrained/`, and the tables in `docs/pretrained.md`.

    python benchmarks/pretrained.py --runs runs --data-dir data
    python benchmarks/pretrained.py --runs runs --only digits-linf-0.1

A model is trained by the command of its recipe, unless `--runs` has that training already. Its
weights are packed, and the packed file is evaluated, so that every figure of its card is one of the
file that is shipped. A network for digits takes about a minute of CPU time, and one for MNIST ten.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from robusttrain.checkpoints import checkpoint as checkpoints
from robusttrain.checkpoints.pretrained import FOLDER, PREFIX, card, digest, names
from robusttrain.run_directory import MANIFEST, REPORT, RESULT

PAGE = Path(__file__).parents[1] / "docs" / "pretrained.md"

DIGITS = "digits of scikit-learn (UCI Optical Recognition of Handwritten Digits, CC BY 4.0)"
MNIST = "MNIST (LeCun and Cortes, CC BY-SA 3.0)"

FIGURES = ("n", "accuracy", "ci_low", "ci_high")


class Recipe(NamedTuple):
    """How a model is made: the words of its training and evaluation, and its data.

    `note` says what its figures do not show.
    """

    training: list[str]
    evaluation: list[str]
    data: str
    note: str = ""


RECIPES = {
    "digits-linf-0.1": Recipe(["defense=madry", "eps=0.1"], ["evaluation=autoattack"], DIGITS),
    "digits-l2-0.5": Recipe(
        ["defense=madry", "norm=l2", "eps=0.5"], ["evaluation=autoattack"], DIGITS
    ),
    "digits-ibp-0.1": Recipe(
        ["defense=ibp", "eps=0.1", "epochs=80", "training.curriculum.eps_warmup=0.6",
         "training.curriculum.per_batch=true"],
        ["evaluation=autoattack", "evaluation.verify=true"],
        DIGITS,
    ),
    "mnist-linf-0.3": Recipe(
        ["experiment=mnist", "defense=madry", "eps=0.3", "model=conv_net",
         "model.channels=[8,16]", "model.strides=[2,2]", "model.hidden=[64]", "attack.steps=5",
         "epochs=8", "schedule.warmup=0.1", "training.curriculum.eps_warmup=0.4"],
        ["evaluation=fast", "evaluation.first=1000"],
        MNIST,
    ),
}  # fmt: skip


def make(name: str, recipe: Recipe, runs: Path, data_dir: str) -> None:
    """Train a model unless that is done, pack it, evaluate the file, and write its card."""
    place = ["device=cpu", *([f"data_dir={data_dir}"] if recipe.data == MNIST else [])]
    training = ["stages=[train]", *recipe.training]
    evaluation = ["stages=[evaluate]", f"checkpoint={PREFIX}{name}", *recipe.evaluation]
    run, evaluated = runs / name, runs / f"{name}-evaluated"
    if not (run / MANIFEST).is_file():
        robusttrain(*training, *place, f"hydra.run.dir={run}")
    content = pack(run, FOLDER / f"{name}.pt") | {
        "data": recipe.data,
        "note": recipe.note,
        "license": "MIT",
        "training": shlex.join(["robusttrain", *training]),
        "evaluation": shlex.join(["robusttrain", *evaluation]),
        "sha256": digest(FOLDER / f"{name}.pt"),
        "versions": json.loads((run / MANIFEST).read_text())["versions"],
    }
    write(name, content)
    robusttrain(*evaluation, *place, f"hydra.run.dir={evaluated}")
    write(name, content | figures(evaluated))


def robusttrain(*words: str) -> None:
    """Run a command line, which must succeed."""
    subprocess.run([sys.executable, "-m", "robusttrain", *words], check=True)


def pack(run: Path, file: Path) -> dict[str, Any]:
    """Write the weights of a run as a shipped file, and return what it holds."""
    saved = checkpoints.load(run)
    # The place of the data is not that of the user.
    packed = replace(saved, config=saved.config | {"data_dir": "data"}, training={})
    file.parent.mkdir(exist_ok=True)
    packed.save(file)
    return {
        "dataset": saved.names["dataset"],
        "model": saved.names["model"],
        "parameters": sum(weight.numel() for weight in saved.model.values()),
        "norm": str(saved.config["norm"]),
        "eps": saved.config["eps"],
        "epoch": saved.epoch,
    }


def figures(run: Path) -> dict[str, Any]:
    """The figures of an evaluation, with their intervals, and the verdict of its audit."""
    report = pd.read_csv(run / REPORT).set_index("attack")
    kept = [name for name in ("clean", "worst_case", "verified") if name in report.index]
    found = {name: {key: report.loc[name, key].item() for key in FIGURES} for name in kept}
    return {"figures": found, "audit": json.loads((run / RESULT).read_text())["audit"]}


def write(name: str, content: dict[str, Any]) -> None:
    """Write the card of a model."""
    (FOLDER / f"{name}.json").write_text(json.dumps({"name": name} | content, indent=2) + "\n")


def percent(figure: dict[str, float] | None) -> str:
    """An accuracy in % with its interval."""
    if figure is None:
        return ""
    mean, low, high = (f"{100 * figure[key]:.1f}" for key in FIGURES[1:])
    return f"{mean} ({low} to {high})"


def tables() -> dict[str, pd.DataFrame]:
    """The tables of the manual, by their headings."""
    cards = [card(name) for name in names()]
    models = pd.DataFrame(
        {
            "name": f"`{each['name']}`",
            "images": f"{each['figures']['clean']['n']:,} of {each['dataset']}",
            "threat model": f"{each['norm']}, eps {each['eps']:g}",
            "network": f"{each['model']}, {each['parameters']:,} parameters",
            "clean": percent(each["figures"]["clean"]),
            "worst case": percent(each["figures"]["worst_case"]),
            "proven": percent(each["figures"].get("verified")),
            "audit": each["audit"],
        }
        for each in cards
    )
    recipes = pd.DataFrame(
        {
            "name": f"`{each['name']}`",
            "training": f"`{each['training']}`",
            "evaluation": f"`{each['evaluation']}`",
            "data": each["data"],
            "note": each["note"],
            "license": each["license"],
            "SHA-256": f"`{each['sha256']}`",
        }
        for each in cards
    )
    return {"Models": models, "Recipes": recipes}


def markdown(table: pd.DataFrame) -> str:
    """A table of the manual."""
    lines = [list(table), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines) + "\n"


def write_page() -> None:
    """Replace the table under each heading of the manual's page."""
    text = PAGE.read_text()
    for heading, table in tables().items():
        before, head, rest = text.partition(f"## {heading}\n")
        rest = re.sub(r"(^\|.*\n)+", lambda _, t=table: markdown(t), rest, count=1, flags=re.M)
        text = before + head + rest
    PAGE.write_text(text)


def main() -> None:
    """Parse the command line, and make the models."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, required=True, help="directory of the trainings")
    parser.add_argument("--data-dir", default="data", help="directory of MNIST")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    given = parser.parse_args()
    for name in given.only:
        make(name, RECIPES[name], given.runs, given.data_dir)
    write_page()


if __name__ == "__main__":
    main()
