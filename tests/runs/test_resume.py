"""Runs that are killed, stopped or disturbed, against an uninterrupted run."""

import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console

from robusttrain.checkpoints import checkpoint as checkpoints
from robusttrain.errors import InputError
from robusttrain.report.terminal import Terminal
from robusttrain.run_directory import LATEST, PREVIOUS
from robusttrain.runs.lock import alone_in
from robusttrain.runs.rerun import Repetition
from robusttrain.runs.resume import Command, resumed
from robusttrain.training.checkpointing import newest_checkpoint
from toys.command_line import CommandLine, Running
from toys.kills import ROLLING_BACK, TROUBLE, until_done
from toys.runs import RUN, finished, refused, same
from toys.tries import tries

pytestmark = pytest.mark.long


class Uninterrupted(NamedTuple):
    """A run that nothing disturbs, and how long it takes."""

    run_dir: Path
    seconds: float


@pytest.fixture(scope="module")
def uninterrupted(
    command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory
) -> Uninterrupted:
    began = time.monotonic()
    answer = finished(command_line.start(*RUN, cwd=tmp_path_factory.mktemp("whole")))
    return Uninterrupted(answer.run_dir, time.monotonic() - began)


@pytest.fixture
def whole(uninterrupted: Uninterrupted) -> Path:
    return uninterrupted.run_dir


# How often a run is killed.
KILLS = tries(5, 20)


def test_a_killed_run_resumes_and_ends_the_same(
    command_line: CommandLine, tmp_path: Path, uninterrupted: Uninterrupted
) -> None:
    """Once within its first epoch, and once in each of equal parts of the run."""
    begin, said = partial(command_line.start, cwd=tmp_path), ""
    whole, length = uninterrupted
    for number in range(KILLS + 1):
        folder = tmp_path / f"killed_{number}"
        running = begin(*RUN, f"hydra.run.dir={folder}")
        if number == KILLS:
            running.until(f"killed_{number}/checkpoint.pt")
        else:
            time.sleep(length * (number + (7 * number % 10) / 10) / KILLS)
        killed = running.signal(signal.SIGKILL).end().code == -signal.SIGKILL
        if killed and not (folder / "manifest.json").exists():
            begun = (folder / "command.json").is_file()
            again = [f"resume={folder}"] if begun else [*RUN, f"hydra.run.dir={folder}"]
            said += finished(begin(*again)).said
        same(folder, whole)
    # Or the test shows little.
    assert re.search(r"resuming after batch [1-9]", said)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_stopped_run_prints_how_to_resume(
    command_line: CommandLine, tmp_path: Path, whole: Path, name: str
) -> None:
    begin = partial(command_line.start, cwd=tmp_path)
    running = begin(*RUN, f"hydra.run.dir={name}").until(f"{name}/checkpoint.pt")
    stopped = running.signal(signal.Signals[name]).end()
    assert stopped.code == 128 + signal.Signals[name], stopped.said
    assert f"stopped by {name}; resume with: robusttrain resume=" in stopped.said
    finished(begin(f"resume={name}"))
    same(tmp_path / name, whole)
    assert f"resume={name} is finished" in refused(begin(f"resume={name}"))


def test_a_directory_has_one_run_and_a_second_signal_ends_it_at_once(
    command_line: CommandLine, tmp_path: Path
) -> None:
    command = [*RUN, "epochs=200", "hydra.run.dir=shared"]
    first = command_line.start(*command, cwd=tmp_path).until("shared/checkpoint.pt")
    second = refused(command_line.start(*command, cwd=tmp_path))
    assert "in use: another process runs there" in second
    assert first.signal(signal.SIGTERM, signal.SIGTERM).end().code == 143


def full(size: int) -> str:
    """Code that limits files to `size` bytes."""
    return f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"


def test_a_full_disk_ends_a_run_with_a_message_and_it_resumes_with_free_space(
    command_line: CommandLine, tmp_path: Path, whole: Path
) -> None:
    begin = partial(command_line.start, cwd=tmp_path)
    # Space for nothing; and for the model, but not for the state of the optimiser.
    for size in (1, (whole / "checkpoint.pt").stat().st_size * 3 // 4):
        said = refused(begin(*RUN, "hydra.run.dir=full", first=full(size)))
    assert "checkpoint.pt cannot be used: it could not be written completely" in said
    resumed = finished(begin("resume=full"))
    assert "no checkpoint was written yet: starting from scratch" in resumed.said
    same(tmp_path / "full", whole)


# Without its capabilities, root is bound by the modes of files, as other users are.
POWERLESS = """
import ctypes
nothing = (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), nothing) == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="takes capabilities away, which Linux has")
def test_a_read_only_directory_ends_a_run_with_a_message(
    command_line: CommandLine, tmp_path: Path, whole: Path
) -> None:
    begin = partial(command_line.start, cwd=tmp_path, first=POWERLESS)
    (tmp_path / "closed").mkdir(0o555)
    said = refused(begin(*RUN, "hydra.run.dir=closed"))
    assert "closed/robusttrain.log cannot be used: Permission denied" in said

    closing = tmp_path / "closing"
    running = begin(*RUN, "hydra.run.dir=closing").until("closing/checkpoint.pt")
    closing.chmod(0o555)
    for stopped in (running, begin("resume=closing")):
        assert re.search(r"closing/\S+ cannot be used: Permission denied", refused(stopped))
    closing.chmod(0o755)
    finished(begin("resume=closing"))
    # No existing result is lost.
    same(closing, whole)


def test_a_missing_directory_ends_a_run_with_a_message(
    command_line: CommandLine, tmp_path: Path, whole: Path
) -> None:
    begin, removed = partial(command_line.start, cwd=tmp_path), tmp_path / "removed"
    running = begin(*RUN, "hydra.run.dir=removed").until("removed/checkpoint.pt")
    removed.rename(tmp_path / "elsewhere")
    said = refused(running)
    assert re.search(r"removed/\S+ cannot be used: No such file or directory", said)
    assert not removed.exists()
    finished(begin("resume=elsewhere"))
    same(tmp_path / "elsewhere", whole)


def test_a_truncated_checkpoint_is_replaced_by_the_previous_one(tmp_path: Path) -> None:
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


def test_directories_may_have_any_name(command_line: CommandLine, tmp_path: Path) -> None:
    begin, folder = partial(command_line.start, cwd=tmp_path), "a,b (c) [d] it's 3"
    running = begin(*RUN, f'hydra.run.dir="{folder}"').until(f"{folder}/checkpoint.pt")
    assert running.signal(signal.SIGTERM).end().code == 143
    finished(begin(f"resume={folder}"))
    finished(begin("rerun", folder))


LATE = """
import os, signal
from robusttrain.training.checkpointing import TrainingRun
keep = TrainingRun._record
def kept(self, epoch):
    keep(self, epoch)
    if epoch.epoch == self.trainer.settings.epochs:
        os.kill(os.getpid(), signal.SIGTERM)
TrainingRun._record = kept
"""


def test_a_signal_after_the_last_batch_is_not_lost(
    command_line: CommandLine, tmp_path: Path
) -> None:
    begin, late = partial(command_line.start, cwd=tmp_path), tmp_path / "late"
    assert begin(*RUN, f"hydra.run.dir={late}", first=LATE).end().code == 143
    assert not (late / "report.csv").exists()
    finished(begin(f"resume={late}"))


def stopped_run(folder: Path, typed: Sequence[str] = RUN) -> Path:
    folder.mkdir(parents=True)
    Command(["--config-dir=/mine", *typed], list(typed)).write(folder)
    return folder


def test_the_command_of_a_run_is_restored(tmp_path: Path) -> None:
    run = stopped_run(tmp_path / "run", ["eps=0.1"])
    assert resumed(["a=1"]) == ["a=1"]
    assert resumed([f"resume={run}", "trust=[code]"]) == [
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
        (["resume=nowhere"], "resume=nowhere is not the directory of a run"),
        (["resume=run", "eps=0.2"], "resume=run takes the whole command .*: remove eps=0.2"),
        (["resume=done"], "resume=done is finished"),
    ],
)
def test_a_run_that_cannot_resume_is_refused(
    arguments: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stopped_run(Path("run"))
    (stopped_run(Path("done")) / "manifest.json").touch()
    with pytest.raises(InputError, match=named):
        resumed(arguments)


def test_a_locked_directory_is_refused_and_half_written_files_are_removed(tmp_path: Path) -> None:
    half = tmp_path / ".report.csv.1.partial"
    half.touch()
    with alone_in(tmp_path):
        assert not half.exists()
        with pytest.raises(InputError, match="in use"), alone_in(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


HARMLESS = [
    "--config-name=config",
    "model=mlp",
    "+attack@evaluation.attacks.x=pgd",
    "~evaluation.attacks.fgsm",
    "eps=8/255",
]
HARMFUL = [
    "+hydra.callbacks.x._target_=pathlib.Path.touch",
    "hydra.job.name=../x",
    "hydra.searchpath=[file:///there]",
    "hydra/job_logging=none",
    "+attack@hydra.callbacks.x=pgd",
    "--config-dir=there",
    "--experimental-rerun=job.pickle",
    "eps=0.1,0.2",
    "model._target_=os.system",
    "+model.front={_target_: os.system, command: x}",
    "model.widths=[{_target_: os.system}]",
    "eps=${oc.create:x}",
    "attack.source.trust=[os]",
    "++evaluation.attacks.x.source.trust=[os]",
    "+model.source={_target_: robusttrain.load_model, run: there, trust: [os]}",
    "+evaluation.attacks.x.source={run: there, trust: [os]}",
    "+model.sources=[{trust: [os]}]",
]


@pytest.mark.parametrize("word", HARMFUL)
def test_a_saved_command_runs_nothing_without_consent(tmp_path: Path, word: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    Command([*HARMLESS, word], []).write(run)
    (tmp_path / "manifest.json").write_text(json.dumps({"overrides": [*HARMLESS, word]}))
    for consent in ([], ["trust=[torch]"]):
        with pytest.raises(
            InputError, match=r"json contains .*trust|json would (build .*trust|compute|trust)"
        ):
            resumed([f"resume={run}", *consent])
        with pytest.raises(
            InputError, match=r"json contains .*trust|json would (build .*trust|compute|trust)"
        ):
            Repetition.of([str(tmp_path), *consent])
    assert word in resumed([f"resume={run}", "trust=[code]"])
    assert word in Repetition.of([str(tmp_path), "trust=[code]"]).command


def test_a_saved_command_does_not_say_what_to_trust(tmp_path: Path) -> None:
    Command([*HARMLESS, "trust=[their_package]"], []).write(tmp_path)
    assert resumed([f"resume={tmp_path}"])[:-2] == HARMLESS
    mine = resumed([f"resume={tmp_path}", "trust=[mine]"])
    assert mine[:-2] == [*HARMLESS, "trust=[mine]"]


@pytest.mark.parametrize(
    ("words", "trust"),
    [
        (["eps=0.1"], []),
        (["eps=0.1", "trust=[mine]"], ["trust=[mine]"]),
        (["model._target_=mine.Net"], ["trust=[code]"]),
        (["model._target_=mine.Net", "trust=[mine]"], ["trust=[code]"]),
        (["--config-dir=mine"], ["trust=[code]"]),
    ],
)
def test_the_advice_to_resume_has_the_trust_that_is_needed(
    tmp_path: Path, words: list[str], trust: list[str]
) -> None:
    command = Command(words, [])
    command.write(tmp_path)
    assert command.trust == trust
    assert resumed([f"resume={tmp_path}", *trust])[: len(words)] == words


def test_what_the_user_types_needs_no_consent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`resume=auto` takes it from the user, even where a saved command claims to be the same."""
    monkeypatch.chdir(tmp_path)
    typed, run = ["--config-dir=mine", "eps=0.1"], Path("outputs/run")
    run.mkdir(parents=True)
    Command(["--config-dir=theirs"], typed).write(run)
    assert resumed([*typed, "resume=auto"])[:-2] == typed


def test_weights_of_another_training_are_refused(command_line: CommandLine, tmp_path: Path) -> None:
    """Training has ended, and `best.pt` is exchanged before the evaluation is resumed."""
    words = ["dataset=synthetic", "model=linear", "evaluation=quick", "evaluation.samples=20"]
    for seed in (0, 1):
        here = [f"seed={seed}", f"hydra.run.dir={seed}", "epochs=1", "evaluation.audit=false"]
        here += ["training.keep=last"]
        finished(command_line.start(*words, *here, cwd=tmp_path))
    (tmp_path / "0" / "manifest.json").unlink()
    (tmp_path / "0" / "best.pt").write_bytes((tmp_path / "1" / "best.pt").read_bytes())
    said = refused(command_line.start("resume=0", cwd=tmp_path))
    assert "best.pt is of another training: seed differ" in said


def test_a_reference_is_repeated_as_it_was_typed(command_line: CommandLine, tmp_path: Path) -> None:
    words = [
        "dataset=synthetic", "model=linear", "epochs=1", "device=cpu",
        "stages=[train]", "attack.steps=${epochs}", "hydra.run.dir=run",
    ]  # fmt: skip
    finished(command_line.start(*words, cwd=tmp_path))
    assert "attack.steps=${epochs}" in Command.read(tmp_path / "run").words


def test_a_training_that_rolls_back_is_killed_again_and_again(
    command_line: CommandLine, tmp_path: Path
) -> None:
    """And ends the same, wherever a file is missing."""
    words = [*RUN, *ROLLING_BACK, "schedule=constant"]
    whole = finished(command_line.start(*words, "hydra.run.dir=whole", cwd=tmp_path, first=TROUBLE))
    assert re.findall(r"restarting epoch (\d) .*: (the loss|cat)", whole.said) == [
        ("2", "the loss"), ("2", "cat"),
    ]  # fmt: skip
    folder = tmp_path / "killed"

    def start(kill: str) -> Running:
        begun = (folder / "command.json").is_file()
        again = ["resume=killed"] if begun else [*words, "hydra.run.dir=killed"]
        return command_line.start(*again, cwd=tmp_path, first=f"{TROUBLE}{kill}")

    said = until_done(start)
    assert len(said) > 3
    assert any("resuming after batch" in line and "restarting" in line for line in said)
    same(folder, tmp_path / "whole")
