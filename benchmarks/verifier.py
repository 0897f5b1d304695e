"""Compare the statuses of images with the answers of Marabou, a verifier from outside.

    pip install maraboupy
    python benchmarks/verifier.py pretrained:digits-ibp-0.1 --eps 0.1 --images 100 --to verifier

`evaluation=verified` gives each of the first test images of the digits its status, and
`robusttrain export` writes the network as ONNX and its questions as VNNLIB files. Marabou (Wu et
al. 2024, maraboupy 2.0.0 was tried) reads these files alone. The script prints how often its
answer is `unsat`, `sat` or another one for each status. A proven image with `sat`, or a
broken one with `unsat`, ends it with an error.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
from maraboupy import Marabou

from robusttrain.run_directory import SAMPLES

BOUND = re.compile(r"\(assert \((<=|>=) X_(\d+) (\S+?)\)\)")
TARGET = re.compile(r"\(>= Y_(\d+) Y_(\d+)\)")

CONTRADICTIONS = {("proven", "sat"), ("broken", "unsat")}


def robusttrain(*words: str) -> None:
    """Run a command line, whose failure ends the script."""
    subprocess.run([sys.executable, "-m", "robusttrain", *words], check=True)


def answer(network: Path, specification: Path, seconds: int) -> str:
    """What Marabou says of one file: `sat`, `unsat`, or else why it cannot say, as `TIMEOUT`."""
    text, said = specification.read_text(), "unsat"
    for k, y in TARGET.findall(text):
        found = ask(network, text, int(k), int(y), seconds)
        if found == "sat":
            return found
        said = said if found == "unsat" else found
    return said


def ask(network: Path, text: str, k: int, y: int, seconds: int) -> str:
    """Whether class `k` can reach class `y` within the bounds of a specification."""
    asked = Marabou.read_onnx(str(network))
    pixels, logits = asked.inputVars[0].flatten(), asked.outputVars[0].flatten()
    for side, pixel, value in BOUND.findall(text):
        set_bound = asked.setUpperBound if side == "<=" else asked.setLowerBound
        set_bound(pixels[int(pixel)], float(value))
    asked.addInequality([logits[y], logits[k]], [1, -1], 0)
    options = Marabou.createOptions(timeoutInSeconds=seconds, verbosity=0)
    return str(asked.solve(verbose=False, options=options)[0])


def main() -> None:
    """Evaluate and export the model, ask Marabou, and print the table of answers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a run on the digits, or pretrained:NAME")
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--seconds", type=int, default=60, help="limit of Marabou for a class")
    parser.add_argument("--to", type=Path, required=True, help="a new directory")
    given = parser.parse_args()
    given.to.mkdir(parents=True)
    run, network = given.to / "run", given.to / "network.onnx"
    robusttrain(
        "stages=[evaluate]", f"checkpoint={given.model}", f"eps={given.eps}", "report=none",
        "evaluation=verified", f"evaluation.first={given.images}",
        f"hydra.run.dir={run}",
    )  # fmt: skip
    samples = pd.read_csv(run / SAMPLES).set_index("index")
    robusttrain(
        "export", given.model, "--to", "onnx", "--out", str(network), "--spec", "--eps",
        str(given.eps), "--indices", *map(str, samples.index),
    )  # fmt: skip
    answers, started = {}, time.perf_counter()
    for specification in sorted(Path(f"{network}-spec").glob("*.vnnlib")):
        answers[int(specification.stem.rpartition("-")[2])] = answer(
            network, specification, given.seconds
        )
    said = samples["status"].to_frame().join(pd.Series(answers, name="Marabou"), how="inner")
    print(pd.crosstab(said["status"], said["Marabou"]))
    print(f"{time.perf_counter() - started:.0f} s for {len(said)} images by Marabou")
    wrong = [row for row in said.itertuples() if tuple(row[1:]) in CONTRADICTIONS]
    if wrong:
        sys.exit(f"contradictions: {wrong}")


if __name__ == "__main__":
    main()
