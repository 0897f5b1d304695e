"""Measure what a command line costs before and besides its work, as ratios to importing torch.

    OMP_NUM_THREADS=1 python benchmarks/start.py
    OMP_NUM_THREADS=1 python benchmarks/start.py --rounds 9 --only "a misspelt key"

Costs are CPU seconds of the whole process, user and system, so that other programs on the machine
hardly matter. The commands take turns in each round, and so does `python -c "import torch"`. Ratios
are medians over the rounds.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

from rich.console import Console
from rich.table import Table

TORCH = 'python -c "import torch"'

# What every training does, and what torch imports for it.
ADAM = "import torch; torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])"

PROGRAM = [sys.executable, "-m", "robusttrain"]
QUERY = [*PROGRAM, "-sc", "query=bash"]

# By name: the command, and the line at whose end the user presses TAB.
COMMANDS: dict[str, tuple[list[str], str]] = {
    TORCH: ([sys.executable, "-c", "import torch"], ""),
    "the same, and an Adam": ([sys.executable, "-c", ADAM], ""),
    "--version": ([*PROGRAM, "--version"], ""),
    "--help": ([*PROGRAM, "--help"], ""),
    "a misspelt option": ([*PROGRAM, "defense=mardy"], ""),
    "a misspelt key": ([*PROGRAM, "attack.stpes=3"], ""),
    "a value out of range": ([*PROGRAM, "eps=-1"], ""),
    "TAB after a group": (QUERY, "robusttrain defense=ma"),
    "TAB after a key": (QUERY, "robusttrain attack.st"),
    "TAB after nothing": (QUERY, "robusttrain "),
    "experiment=smoke": ([*PROGRAM, "experiment=smoke"], ""),
}


def cpu_seconds(command: list[str], line: str) -> float:
    """CPU seconds of a command, which runs in an empty folder."""
    completed = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    with tempfile.TemporaryDirectory() as folder:
        before = os.times()
        subprocess.run(
            command, cwd=folder, env=os.environ | completed, check=False,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        after = os.times()
    user = after.children_user - before.children_user
    return user + after.children_system - before.children_system


def main() -> None:
    """Parse the command line, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    asked = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in dict.fromkeys([TORCH, *asked.only])}
    for _ in range(asked.rounds):
        for name, measured in seconds.items():
            measured.append(cpu_seconds(*COMMANDS[name]))
    table = Table(title=f"{asked.rounds} rounds", title_justify="left")
    table.add_column("command")
    for column in ("CPU seconds", "ratio"):
        table.add_column(column, justify="right")
    for name, measured in seconds.items():
        ratios = [a / b for a, b in zip(measured, seconds[TORCH], strict=True)]
        table.add_row(
            name, f"{statistics.median(measured):.2f}", f"{statistics.median(ratios):.2f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
