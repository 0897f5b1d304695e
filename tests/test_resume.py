"""Runs that are killed, stopped or disturbed, against one that nothing has happened to."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from robusttrain import checkpoint as checkpoints
from robusttrain.errors import InputError
from robusttrain.report.terminal import Terminal
from robusttrain.resuming import Command, alone_in, resumed
from robusttrain.training_run import LATEST, PREVIOUS, newest_checkpoint

pytestmark = pytest.mark.long

# Every stream that a run can draw from is in use: augmentation, attack, noise and votes.
RUN = [
    "defense=alpha_mix", "attack=pgd", "attack.steps=2", "noise=gaussian", "noise.predict=true",
    "dataset=synthetic", "model=mlp", "dataset.crop=1", "dataset.flip=true", "epochs=6",
    "batch_size=64", "evaluation=quick", "evaluation.samples=40", "evaluation.audit=false",
    "evaluation.eot=2", "evaluation.votes=5", "training.checkpoint_minutes=0.0001",
    "optimizer=sgd", "device=cpu",
]  # fmt: skip

# Imports and looks for plugins once, then forks a process for each command.
DRIVER = """
import json, os, signal, sys, time, traceback
from pathlib import Path
from hydra._internal.hydra import Hydra
from hydra.core.plugins import Plugins
from robusttrain import cli
from robusttrain.__main__ import main


cli.configs.register()
cli.configs.register = lambda: None
Plugins.instance()
# For this Hydra composes every configuration once more, and finds none.
Hydra.get_mode = lambda self, **names: None

def start(arguments):
    child = os.fork()
    if child:
        return child
    with open("said.txt", "ab", 0) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    sys.argv[1:] = arguments
    code = 1
    try:
        main()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
        print(left.code, flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)

def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

"""


def driven(folder: Path, script: str, *arguments: str) -> Any:
    """What `script`, which runs behind `DRIVER` in `folder`, prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER + script, *arguments],
        cwd=folder, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def rows(path: Path) -> list[dict[str, str]]:
    """A table without what the clock says."""
    with path.open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def same(one: Path, other: Path) -> None:
    for name in ("train.csv", "report.csv", "samples.csv"):
        assert rows(one / name) == rows(other / name), name
    for name in ("best.pt", "checkpoint.pt"):
        ours, theirs = (checkpoints.load(run / name) for run in (one, other))
        assert ours.model.keys() == theirs.model.keys()
        assert all(torch.equal(ours.model[key], theirs.model[key]) for key in ours.model), name
    assert not list(one.glob(".*partial")) + list(one.glob(".lock"))


KILLS = """
run, kills = sys.argv[1:-1], int(sys.argv[-1])
began = time.monotonic()
assert end(start([*run, "hydra.run.dir=whole"])) == 0
length = time.monotonic() - began
codes = []
for number in range(kills):
    folder = f"killed_{number}"
    child = start([*run, f"hydra.run.dir={folder}"])
    # One in each twentieth of the run, somewhere in it.
    time.sleep(length * (number + (7 * number % 10) / 10) / kills)
    os.kill(child, signal.SIGKILL)
    killed = end(child) == -signal.SIGKILL
    begun = Path(folder, "command.json").is_file()
    again = [f"resume={folder}"] if begun else [*run, f"hydra.run.dir={folder}"]
    codes.append(end(start(again)) if killed and not Path(folder, "manifest.json").exists() else 0)
print(json.dumps(codes))
"""


def test_a_run_that_is_killed_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    codes = driven(tmp_path, KILLS, *RUN, "20")
    assert codes == [0] * 20, (tmp_path / "said.txt").read_text()
    said = (tmp_path / "said.txt").read_text()
    # Some were killed within an epoch of the training, or this has shown little.
    assert re.search(r"going on behind batch [1-9]", said)
    for number in range(20):
        same(tmp_path / f"killed_{number}", tmp_path / "whole")


SIGNALS = """
run = sys.argv[1:]
assert end(start([*run, "hydra.run.dir=whole"])) == 0
codes = {}
for name in ("SIGTERM", "SIGINT"):
    child = start([*run, f"hydra.run.dir={name}"])
    while not Path(name, "checkpoint.pt").exists():
        time.sleep(0.001)
    os.kill(child, getattr(signal, name))
    codes[name] = end(child)
    second = start([f"resume={name}"])
    codes["resumed " + name] = end(second)
    codes["finished " + name] = end(start([f"resume={name}"]))
first = start([*run, "epochs=200", "hydra.run.dir=shared"])
while not Path("shared", "checkpoint.pt").exists():
    time.sleep(0.001)
codes["two at once"] = end(start([*run, "epochs=200", "hydra.run.dir=shared"]))
os.kill(first, signal.SIGTERM)
os.kill(first, signal.SIGTERM)
codes["twice"] = end(first)
print(json.dumps(codes))
"""


def test_a_run_that_is_told_to_stop_says_how_to_go_on(tmp_path: Path) -> None:
    codes = driven(tmp_path, SIGNALS, *RUN)
    said = (tmp_path / "said.txt").read_text()
    assert codes == {
        "SIGTERM": 143, "resumed SIGTERM": 0, "finished SIGTERM": 1,
        "SIGINT": 130, "resumed SIGINT": 0, "finished SIGINT": 1,
        "two at once": 1, "twice": 143,
    }, said  # fmt: skip
    for name in ("SIGTERM", "SIGINT"):
        assert f"stopped by {name}: robusttrain resume=" in said
        assert f"resume={name} is finished" in said
        same(tmp_path / name, tmp_path / "whole")
    assert "in use: another process runs there" in said


FULL = """
import resource
run = sys.argv[1:]
assert end(start([*run, "hydra.run.dir=whole"])) == 0
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
codes = []
# Room for nothing, and for the model but not for the optimiser's memory of it.
for size in (1, Path("whole", "checkpoint.pt").stat().st_size * 3 // 4):
    # The soft limit alone, so that it can be lifted again.
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    codes.append(end(start([*run, "hydra.run.dir=full"])))
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
codes.append(end(start(["resume=full"])))
print(json.dumps(codes))
"""


def test_a_full_disk_ends_a_run_with_a_message_and_it_goes_on_when_there_is_space(
    tmp_path: Path,
) -> None:
    codes = driven(tmp_path, FULL, *RUN)
    said = (tmp_path / "said.txt").read_text()
    assert codes == [1, 1, 0], said
    assert "Traceback" not in said
    assert "checkpoint.pt cannot be used: it could not be written whole" in said
    assert "no checkpoint was written yet: training begins anew" in said
    same(tmp_path / "full", tmp_path / "whole")


UNWRITABLE = """
import ctypes
run = sys.argv[1:]
libc = ctypes.CDLL(None)

def powerless(arguments):
    # Root without its powers is bound by the modes of its own files, as everybody is.
    child = os.fork()
    if child:
        return child
    assert libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0
    os._exit(end(start(arguments)))

def begun(child, folder):
    while not Path(folder, "checkpoint.pt").exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.001)
    return child

assert end(start([*run, "hydra.run.dir=whole"])) == 0
os.mkdir("closed", 0o555)
codes = [end(powerless([*run, "hydra.run.dir=closed"]))]
child = begun(powerless([*run, "hydra.run.dir=closing"]), "closing")
os.chmod("closing", 0o555)
codes += [end(child), end(powerless(["resume=closing"]))]
os.chmod("closing", 0o755)
codes.append(end(powerless(["resume=closing"])))
child = begun(start([*run, "hydra.run.dir=removed"]), "removed")
os.rename("removed", "elsewhere")
codes.append(end(child))
there = os.path.exists("removed")
codes += [there, end(start(["resume=elsewhere"]))]
print(json.dumps(codes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="takes capabilities away, which Linux has")
def test_a_directory_that_is_closed_or_gone_ends_a_run_with_a_message(tmp_path: Path) -> None:
    codes = driven(tmp_path, UNWRITABLE, *RUN, "epochs=2")
    said = (tmp_path / "said.txt").read_text()
    assert codes == [1, 1, 1, 0, 1, False, 0], said
    assert "Traceback" not in said
    cannot = [line for line in said.splitlines() if line.endswith("Permission denied")]
    assert len(cannot) == 3, said
    assert "closed/robusttrain.log cannot be used" in cannot[0]
    assert all("closing/" in line for line in cannot[1:])
    assert re.search(r"removed/\S+ cannot be used: No such file or directory", said)
    # Nothing of what was there is lost.
    for name in ("closing", "elsewhere"):
        same(tmp_path / name, tmp_path / "whole")


def test_a_checkpoint_that_is_cut_anywhere_gives_way_to_the_one_before(tmp_path: Path) -> None:
    weights = {"weight": torch.randn(100)}
    about: dict[str, Any] = {
        "num_classes": 2, "image_shape": [1, 2, 2], "config": {}, "names": {}, "training": {},
    }  # fmt: skip
    for epoch, name in enumerate((PREVIOUS, LATEST), 1):
        checkpoints.Checkpoint(model=weights, epoch=epoch, **about).save(tmp_path / name)
    content = (tmp_path / LATEST).read_bytes()
    said = io.StringIO()
    terminal = Terminal(Console(file=said, width=200))
    newest = newest_checkpoint(tmp_path, terminal)
    assert newest is not None
    assert newest.epoch == 2
    for tenth in range(10):
        (tmp_path / LATEST).write_bytes(content[: len(content) * tenth // 10])
        newest = newest_checkpoint(tmp_path, terminal)
        assert newest is not None
        assert newest.epoch == 1
    assert said.getvalue().count("checkpoint.pt cannot be read") == 10
    (tmp_path / PREVIOUS).unlink()
    assert newest_checkpoint(tmp_path, terminal) is None


ODD = """
run, folder = sys.argv[1:], "a,b (c) [d] it's 3"
child = start([*run, f'hydra.run.dir="{folder}"'])
while not Path(folder, "checkpoint.pt").exists():
    time.sleep(0.001)
os.kill(child, signal.SIGTERM)
codes = [end(child)]
codes.append(end(start([f"resume={folder}"])))
codes.append(end(start(["rerun", folder])))
print(json.dumps(codes))
"""


def test_directories_may_have_any_name(tmp_path: Path) -> None:
    assert driven(tmp_path, ODD, *RUN) == [143, 0, 0], (tmp_path / "said.txt").read_text()


LATE = """
run = sys.argv[1:]
from robusttrain.training_run import TrainingRun
keep = TrainingRun._keep
def kept(self, epoch):
    keep(self, epoch)
    if epoch.epoch == self.trainer.settings.epochs:
        os.kill(os.getpid(), signal.SIGTERM)
TrainingRun._keep = kept
codes = [end(start([*run, "hydra.run.dir=late"])), Path("late", "report.csv").exists()]
TrainingRun._keep = keep
codes.append(end(start(["resume=late"])))
codes.append(end(start([*run, "epochs=2", "hydra.run.dir=late", "stages=[train]"])))
codes.append(len(Path("late", "train.csv").read_text().splitlines()))
print(json.dumps(codes))
"""


def test_a_signal_after_the_last_batch_is_not_lost(tmp_path: Path) -> None:
    codes = driven(tmp_path, LATE, *RUN)
    assert codes == [143, False, 0, 0, 3], (tmp_path / "said.txt").read_text()


def stopped_run(folder: Path, typed: Sequence[str] = RUN) -> Path:
    folder.mkdir(parents=True)
    Command(["--config-dir=/mine", *typed], list(typed)).write(folder)
    return folder


def test_the_command_of_a_run_is_taken_up(tmp_path: Path) -> None:
    run = stopped_run(tmp_path / "run", ["eps=0.1"])
    assert resumed(["a=1"]) == ["a=1"]
    assert resumed([f"resume={run}"]) == [
        "--config-dir=/mine", "eps=0.1", f'hydra.run.dir="{run}"', f'resume="{run}"',
    ]  # fmt: skip


def test_auto_takes_the_newest_unfinished_run_of_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = ["--config-dir", "mine", "eps=0.1", "seed=1"]
    assert resumed([*wanted, "resume=auto"]) == wanted
    stopped_run(Path("outputs/day/first"), wanted)
    newer = stopped_run(Path("outputs/day/second"), wanted)
    os.utime(newer / "command.json", (2e9, 2e9))
    stopped_run(Path("outputs/day/other"), ["eps=0.2", "seed=1"])
    finished = stopped_run(Path("outputs/day/finished"), wanted)
    os.utime(finished / "command.json", (3e9, 3e9))
    (finished / "manifest.json").touch()
    assert resumed([*wanted, "resume=auto"])[-1] == f'resume="{newer}"'
    elsewhere = stopped_run(Path("elsewhere"), wanted)
    named = [*wanted, "hydra.run.dir=elsewhere", "resume=auto"]
    assert resumed(named)[-1] == f'resume="{elsewhere}"'


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["resume=nowhere"], "resume=nowhere is no directory of a run"),
        (["resume=run", "eps=0.2"], "eps=0.2 is not allowed"),
        (["resume=done"], "resume=done is finished"),
    ],
)
def test_what_cannot_go_on_is_refused(
    arguments: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stopped_run(Path("run"))
    (stopped_run(Path("done")) / "manifest.json").touch()
    with pytest.raises(InputError, match=named):
        resumed(arguments)


def test_a_held_directory_is_refused_and_half_files_are_removed(tmp_path: Path) -> None:
    half = tmp_path / ".report.csv.1.partial"
    half.touch()
    with alone_in(tmp_path):
        assert not half.exists()
        with pytest.raises(InputError, match="in use"), alone_in(tmp_path):
            pass
    assert not list(tmp_path.iterdir())
