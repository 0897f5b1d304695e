"""Compare AutoAttack in robusttrain with its authors' code: robust accuracy, time and passes.

    robusttrain experiment=mnist defense=madry hydra.run.dir=outputs/madry
    python benchmarks/evaluation.py outputs/madry --samples 1000
    python benchmarks/evaluation.py outputs/* --evaluation fast --samples 300

The saved model of each run is attacked on the same test images by `--evaluation` (default:
autoattack) and by the package pyautoattack (pip install '.[benchmark]'), which is the code of Croce
and Hein. Each attack runs in a fresh process with one thread. Seconds are CPU seconds of the
attack, so that other programs have little influence. The reference uses torch's own convolutions.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn

from robusttrain import load_model
from robusttrain.attacks.model_view import QueryCounter
from robusttrain.checkpoints import checkpoint as checkpoints
from robusttrain.config import build as configs
from robusttrain.config import schema
from robusttrain.config.folders import CONF
from robusttrain.config.run_config import Config
from robusttrain.data import Split, as_input
from robusttrain.evaluation import evaluate
from robusttrain.models.first_conv import FirstConv2d
from robusttrain.runtime.malloc import keep_freed_memory

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def composed(arguments: argparse.Namespace, run: str) -> tuple[Config, Split]:
    """The evaluation of a run and its test images."""
    schema.register()
    saved = checkpoints.load(run)
    overrides = [
        f"evaluation={arguments.evaluation}",
        f"evaluation.samples={arguments.samples}",
        "evaluation.audit=false",
        f"norm={arguments.norm}",
        f"eps={arguments.eps}",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides)
    OmegaConf.set_struct(config, False)
    config.dataset = saved.config["dataset"]
    config.data_dir, config.download = arguments.data_dir, arguments.data_dir == "data"
    built = configs.build(configs.with_numbers(config))
    _, test = built.dataset.load()
    return built, test


def ours(arguments: argparse.Namespace, run: str) -> dict[str, Any]:
    """Robust accuracy, seconds and passes of robusttrain's evaluation."""
    keep_freed_memory()
    built, test = composed(arguments, run)
    model = load_model(run)
    started = time.process_time()
    ledger = evaluate(model, test, built.evaluation, threat=built.threat, seed=0)
    rows = ledger.report(built.threat).to_dict("records")
    return {
        "accuracy": rows[-1]["accuracy"],
        "seconds": time.process_time() - started,
        "passes": rows[-1]["forward"] + rows[-1]["backward"],
        "steps": {row["attack"]: row["accuracy"] for row in rows},
    }


def reference(arguments: argparse.Namespace, run: str) -> dict[str, Any]:
    """Robust accuracy, seconds and passes of pyautoattack."""
    from pyautoattack import AutoAttack

    built, test = composed(arguments, run)
    split = test.take(built.evaluation.choose(test.size))
    x, y = as_input(split.images), split.labels
    model = load_model(run)
    for module in model.modules():
        if isinstance(module, FirstConv2d):
            module.__class__ = nn.Conv2d
    counted = QueryCounter(model, len(x)) if arguments.count else model
    attack = AutoAttack(
        counted, norm=NORMS[arguments.norm], eps=arguments.eps, device="cpu", seed=0
    )
    started = time.process_time()
    x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=250)
    seconds = time.process_time() - started
    with torch.no_grad():
        accuracy = (model(x_adv).argmax(1) == y).double().mean().item()
    passes = 0.0
    if isinstance(counted, QueryCounter):
        passes = (counted.forward_passes + counted.backward_passes) / len(x)
    return {"accuracy": accuracy, "seconds": seconds, "passes": passes}


def measure_afresh(arguments: argparse.Namespace, suite: str, run: str) -> dict[str, Any]:
    """Measure one of the two in a fresh process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", suite, "--only", run]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured: dict[str, Any] = json.loads(output.splitlines()[-1])
    return measured


def main() -> None:
    """Parse the command line, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", help="run directories")
    parser.add_argument("--evaluation", default="autoattack")
    parser.add_argument("--norm", choices=NORMS, default="linf")
    parser.add_argument("--eps", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--count", action="store_true", help="count the reference's passes")
    parser.add_argument("--measure", choices=("ours", "reference"), help=argparse.SUPPRESS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure:
        measure = ours if arguments.measure == "ours" else reference
        print(json.dumps(measure(arguments, arguments.only)))
        return
    table = Table(title=f"{arguments.evaluation}, {arguments.norm}, eps {arguments.eps:g}")
    for column in ("run", "suite", "robust %", "CPU s", "passes", "ratio of s"):
        table.add_column(column, justify="left" if column in ("run", "suite") else "right")
    for run in arguments.runs:
        found = {suite: measure_afresh(arguments, suite, run) for suite in ("reference", "ours")}
        for suite, result in found.items():
            ratio = result["seconds"] / found["reference"]["seconds"]
            table.add_row(
                Path(run).name, suite, f"{100 * result['accuracy']:.1f}",
                f"{result['seconds']:.0f}", f"{result['passes']:.0f}", f"{ratio:.2f}",
            )  # fmt: skip
        print(run, found["ours"]["steps"], file=sys.stderr)
    Console().print(table)


if __name__ == "__main__":
    main()
