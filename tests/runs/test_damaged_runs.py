"""Damaged and hostile run directories: readers end in a message, or read the run as it was."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from robusttrain.checkpoints import checkpoint as checkpoints
from robusttrain.checkpoints.checkpoint import Checkpoint
from robusttrain.errors import InputError
from robusttrain.report.compare import read_run
from robusttrain.run_directory import BEST, COMMAND, MANIFEST, REPORT, SAMPLES
from robusttrain.runs.rerun import Repetition
from robusttrain.runs.resume import Command, resumed
from robusttrain.runs.saved_model import load_model
from toys.command_line import CommandLine
from toys.runs import finished, listing, with_manifest
from toys.tries import tries

pytestmark = pytest.mark.filterwarnings("ignore::robusttrain.errors.IdentityWarning")

# Damaged files, half of them next to a manifest that identifies them.
CASES = tries(500, 2000)
FILES = (BEST, COMMAND, MANIFEST, REPORT, SAMPLES)
# Readers of a file that the manifest identifies.
READ_BY = {
    BEST: {"weights", "model", "rerun"},
    REPORT: {"compare", "rerun"},
    SAMPLES: {"compare", "rerun"},
}
WORDS = [
    "dataset=synthetic", "dataset.train_size=64", "dataset.test_size=30", "dataset.validation=16",
    "model=linear", "epochs=1", "evaluation=quick", "evaluation.audit=false", "device=cpu",
    "hydra.run.dir=run", "~evaluation.attacks.apgd_ce",
]  # fmt: skip

# What a stranger would like to be run or written; `{marker}` is a file that must not appear.
HOSTILE = [
    "+hydra.callbacks.x._target_=pathlib.Path.touch",
    "hydra.run.dir={marker}", "--config-dir={marker}", "hydra.job.name={marker}",
    "model={{_target_: pathlib.Path.touch, path: {marker}}}", "+x={marker}",
    "${{oc.create:{marker}}}",
    "=1+1", "\x1b[2J", "[/bold]", "../" * 9, "null", "1e999", "{marker}",
]  # fmt: skip

Damage = Callable[[bytes, random.Random, str], bytes]


def flipped(content: bytes, draw: random.Random, marker: str) -> bytes:
    damaged = bytearray(content)
    for _ in range(draw.choice([1, 1, 8])):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def cut(content: bytes, draw: random.Random, marker: str) -> bytes:
    return content[: draw.randrange(len(content))]


def swapped(content: bytes, draw: random.Random, marker: str) -> bytes:
    """Two pieces of the file in each other's place."""
    first, second, third = sorted(draw.randrange(len(content)) for _ in range(3))
    return content[:first] + content[second:third] + content[first:second] + content[third:]


def hostile(content: bytes, draw: random.Random, marker: str) -> bytes:
    """A word of a stranger instead of a value in JSON, or of a cell in a table."""
    word = draw.choice(HOSTILE).format(marker=marker)
    if content.startswith(b"{"):
        return json.dumps(replaced(json.loads(content), draw, word)).encode()
    lines = content.decode(errors="replace").split("\n")
    cells = lines[draw.randrange(len(lines))].split(",")
    place = lines.index(",".join(cells))
    cells[draw.randrange(len(cells))] = word
    return "\n".join([*lines[:place], ",".join(cells), *lines[place + 1 :]]).encode()


def replaced(node: Any, draw: random.Random, word: str) -> Any:
    """`node` with one of its values, or of those inside, replaced."""
    if not isinstance(node, dict | list) or not node or draw.random() < 0.1:
        return word
    copied = node.copy()
    key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
    copied[key] = replaced(node[key], draw, word)
    return copied


DAMAGES: tuple[Damage, ...] = (flipped, cut, swapped, hostile)


@pytest.fixture(scope="module")
def runs(command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run, and one with another seed."""
    folders = tmp_path_factory.mktemp("damaged"), tmp_path_factory.mktemp("other")
    for seed, folder in enumerate(folders):
        finished(command_line.start(*WORDS, f"seed={seed}", cwd=folder))
    run, other = (folder / "run" for folder in folders)
    return run, other


def readers(run: Path) -> dict[str, Callable[[], Any]]:
    return {
        "weights": lambda: checkpoints.load(run),
        "model": lambda: load_model(run),
        "compare": lambda: read_run(run),
        "rerun": lambda: Repetition.of([str(run)]).command,
        "command": lambda: Command.read(run),
        "resume": lambda: without_manifest(run),
    }


def without_manifest(run: Path) -> list[str]:
    (run / MANIFEST).rename(run / "kept")
    try:
        return resumed([f"resume={run}"])
    finally:
        (run / "kept").rename(run / MANIFEST)


@pytest.mark.parametrize("identified", [True, False])
def test_a_damaged_run_is_read_as_it_was_or_refused(
    runs: tuple[Path, Path], tmp_path: Path, identified: bool
) -> None:
    """Files of robusttrain are read by everything that reads a run; nothing runs or is written.

    The manifest identifies the other files, or is of an earlier version and only names them.
    """
    draw, marker, (run, other) = random.Random(0), tmp_path / "marker", runs
    weights, before = checkpoints.load(run).model, listing(run)
    damages: list[Damage] = [*DAMAGES]
    if identified:
        damages.append(lambda *of: (other / path.name).read_bytes())
    else:
        with_manifest(run, files=list(json.loads((run / MANIFEST).read_text())["files"]))
    refused: list[str] = []
    for case in range(CASES // 2):
        path = run / draw.choice(FILES)
        content = path.read_bytes()
        path.write_bytes(draw.choice(damages)(content, draw, str(marker)))
        refusing = set()
        for name, read in readers(run).items():
            try:
                found = read()
            except InputError as error:
                refused.append(str(error))
                refusing.add(name)
                continue
            except Exception as error:
                pytest.fail(f"{name} of case {case}, {path.name}: {error!r}")
            if isinstance(found, Checkpoint):
                assert all(torch.equal(found.model[key], value) for key, value in weights.items())
        if identified and path.read_bytes() != content:
            assert refusing >= READ_BY.get(path.name, set()), (case, path.name)
        path.write_bytes(content)
        assert not marker.exists(), (case, path.name)
    assert listing(run) == before
    assert len(refused) > CASES / 8
    assert not [message for message in refused if "\n" in message]
