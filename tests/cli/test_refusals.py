"""Bad command lines: each line of `refusals.tsv` is refused with one message, before any work.

A line has the arguments, as they are typed in a shell, the exit code, and phrases of the message,
with tabs between them. The first phrase has key and value, where there are such. `{files}` stands
for a folder with defective files and `defects.py`. A line that starts with # is a comment. To add a
case, add a line.
"""

import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from toys.command_line import CommandLine
from toys.runs import SAYS_LOADED, assert_refused

pytestmark = pytest.mark.long

# A small run, which every line changes, unless it names a command.
SMALL = ["dataset=synthetic", "model=linear", "evaluation=quick", "device=cpu"]
COMMANDS = ("compare", "rerun", "resume=")

# Mistakes that are only found in the data.
NEED_DATA = (
    "evaluation.first=257", "evaluation.indices=[0,256]",
    "dataset.validation=600", "dataset.validation=1000", "dataset.train_size=1000000000000",
    "+optimizer.x=1 optimizer._target_=defects.optimizer", "logger._target_=defects.Logger",
)  # fmt: skip

# Data that are loaded, and a step of training, say so.
SAYS = f"""
{SAYS_LOADED}
from robusttrain.training.engine import Engine
train_batch = Engine.train_batch
Engine.train_batch = lambda *batch, **more: print("TRAINED") or train_batch(*batch, **more)
"""

# Components of a user that are none, for `_target_`.
DEFECTS = """
import sys


class Empty:
    pass


class Builds:
    def build(self, num_classes, image_shape):
        return 5


class Optimizer:
    lr = 0.1

    def build(self, parameters):
        return None


class Logger:
    def check(self):
        pass

    def record(self, run_dir, parameters):
        return None


class Data:
    validation, crop, flip = 0, 0, False

    def __init__(self, shape=None, **keys):
        self.shape = shape

    def info(self):
        from robusttrain.data import Info

        return self.shape and Info(tuple(self.shape), 10, ())

    def load(self):
        return None


def data(shape=None, **keys):
    return Data(shape)


def optimizer(**keys):
    return Optimizer()


def number(**keys):
    return 5


def nothing(**keys):
    return None


def fails(**keys):
    raise RuntimeError("this class has failed")


def leaves(**keys):
    sys.exit(3)
"""


class Line(NamedTuple):
    """A line of the file."""

    arguments: str
    code: int
    phrases: list[str]

    def typed(self, files: Path) -> list[str]:
        """The arguments of the command line."""
        given = [word.replace("{files}", str(files)) for word in shlex.split(self.arguments)]
        return given if self.arguments.startswith(COMMANDS) else [*SMALL, *given]


def lines() -> list[Line]:
    text = Path(__file__).with_name("refusals.tsv").read_text()
    rows = [row.split("\t") for row in text.splitlines() if row and not row.startswith("#")]
    return [Line(arguments, int(code), phrases) for arguments, code, *phrases in rows]


@pytest.fixture(scope="module")
def files(command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, and with files that have one defect each."""
    folder = tmp_path_factory.mktemp("files")
    answer = command_line.run(
        *SMALL, "epochs=1", "stages=[train]", "hydra.run.dir=run", cwd=folder, first=SAYS
    )
    assert answer.code == 0, answer.err
    # Otherwise no line could show that it trains.
    assert "LOADED" in answer.out
    assert "TRAINED" in answer.out
    _checkpoints(folder)
    _data_sets(folder)
    (folder / "defects.py").write_text(DEFECTS)
    (folder / "latin" / "experiment").mkdir(parents=True)
    text = "# @package _global_\n# Größe\neps: 0.1\n"
    (folder / "latin" / "experiment" / "mine.yaml").write_text(text, encoding="latin-1")
    for name, content in {"cut": '{"words": [', "other": "[1, 2]"}.items():
        (folder / name).mkdir()
        (folder / name / "command.json").write_text(content)
    return folder


def _checkpoints(folder: Path) -> None:
    whole = (folder / "run" / "best.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"weights": torch.zeros(3)}, folder / "foreign.pt")
    (folder / "text.pt").write_text("no checkpoint\n")
    (folder / "empty.pt").touch()
    saved = torch.load(folder / "run" / "best.pt")
    torch.save(saved | {"config": {}}, folder / "no config.pt")
    torch.save({k: v for k, v in saved.items() if k != "config"}, folder / "without.pt")
    shutil.copy(folder / "run" / "best.pt", folder / "best.pt")


def _data_sets(folder: Path) -> None:
    raw = folder / "corrupt" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte").write_bytes(b"\x00\x00\x08\x03 not an idx file")
    (folder / "no images").mkdir()
    for name in ("cat", "dog"):
        (folder / "no files" / name).mkdir(parents=True)
        (folder / "images" / name).mkdir(parents=True)
        for number in range(3):
            pixels = np.full((8, 8, 3), 40 * number, np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{number}.png")
    grey = np.zeros((6, 8, 8), np.uint8)
    grey[0] = 255
    labels = np.arange(6) % 2
    np.savez(folder / "grey.npz", x=grey, y=labels)
    np.savez(folder / "nan.npz", x=np.full((6, 8, 8), np.nan), y=labels)
    np.savez(folder / "axes.npz", x=np.ones((6, 3, 8, 3)), y=labels)
    np.savez(folder / "test.npz", x_test=grey[:, :7], y_test=labels)
    (folder / "cut.npz").write_bytes((folder / "grey.npz").read_bytes()[:300])
    (folder / "images" / "dog" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n cut off")


def test_the_file_has_each_line_once() -> None:
    given = [line.arguments for line in lines()]
    assert len(given) >= 300
    assert sorted(given) == sorted(set(given))


@pytest.mark.parametrize("line", [pytest.param(line, id=line.arguments) for line in lines()])
def test_a_bad_line_is_refused_before_any_work(
    line: Line, command_line: CommandLine, files: Path, tmp_path: Path
) -> None:
    (tmp_path / "cwd").mkdir()
    answer = command_line.run(
        *line.typed(files), cwd=tmp_path / "cwd", first=SAYS, PYTHONPATH=str(files)
    )
    assert answer.code == line.code, answer.said
    assert line.phrases
    assert_refused(answer, [phrase.replace("{files}", str(files)) for phrase in line.phrases])
    assert "TRAINED" not in answer.out
    assert ("LOADED" in answer.out) == line.arguments.startswith(NEED_DATA)
