"""Runs under torchrun: one writer, signals, refusals, and a process that is killed."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from torch.distributed import TCPStore

from toys.command_line import PATIENCE, Answer, CommandLine, Running
from toys.kills import ROLLING_BACK, TROUBLE, kills
from toys.runs import RUN as ALONE
from toys.runs import same

pytestmark = pytest.mark.long

# Two processes with half a batch each, and a number of images that is odd.
RUN = [*ALONE, "batch_size=32", "evaluation.samples=21"]

# The second process is killed at its tenth search.
SECOND_DIES = """
import os, signal
from robusttrain.attacks.pgd import PGD
search, calls = PGD.search, []
def searching(self, *arguments):
    calls.append(0)
    if len(calls) == 10 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return search(self, *arguments)
PGD.search = searching
"""

KILLED = f"""
from robusttrain.__main__ import main
{SECOND_DIES}
main()
"""


class Torchrun:
    """Starts the processes of a command line as torchrun does, in the folder `cwd`."""

    def __init__(self, command_line: CommandLine, cwd: Path) -> None:
        self.command_line, self.cwd = command_line, cwd
        self.stores: list[TCPStore] = []

    def start(self, *words: object, size: int = 2, first: str = "") -> list[Running]:
        self.stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        shared = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.stores[-1].port),
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
            "WORLD_SIZE": str(size),
        }  # fmt: skip
        return [
            self.command_line.start(
                *words, cwd=self.cwd, first=first, RANK=str(rank), LOCAL_RANK=str(rank), **shared
            )
            for rank in range(size)
        ]

    def run(self, *words: object, size: int = 2, first: str = "") -> list[Answer]:
        return [running.end() for running in self.start(*words, size=size, first=first)]


def codes(answers: list[Answer]) -> list[int]:
    return [answer.code for answer in answers]


@pytest.fixture(scope="module")
def torchrun(command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Torchrun:
    return Torchrun(command_line, tmp_path_factory.mktemp("torchrun"))


@pytest.fixture(scope="module")
def answers(torchrun: Torchrun) -> list[Answer]:
    """The outputs of an uninterrupted run."""
    return torchrun.run(*RUN, "hydra.run.dir=whole")


@pytest.fixture(scope="module")
def whole(torchrun: Torchrun, answers: list[Answer]) -> Path:
    assert codes(answers) == [0, 0], answers
    return torchrun.cwd / "whole"


def test_only_one_process_writes_and_prints(answers: list[Answer], whole: Path) -> None:
    first, second = answers
    assert first.out.count("epoch 3/3") == 1
    assert second.said == ""
    assert [path.name for path in whole.parent.iterdir() if path.is_dir()] == ["whole"]
    assert json.loads((whole / "manifest.json").read_text())["processes"] == 2
    assert not list(whole.glob("evaluation.partial*"))
    assert (whole / "robusttrain.log").read_text().count("epoch 3/3") == 1
    assert len(pd.read_csv(whole / "samples.csv")) == 21


def test_a_signal_to_one_process_stops_all_after_the_same_batch_and_they_resume(
    torchrun: Torchrun, whole: Path
) -> None:
    first, second = torchrun.start(*RUN, "hydra.run.dir=term")
    # Only one of them gets the signal.
    second.until("term/checkpoint.pt").signal(signal.SIGTERM)
    stopped = [first.end(), second.end()]
    assert codes(stopped) == [143, 143]
    again = r"stopped by SIGTERM; resume with: torchrun .*-m robusttrain resume="
    assert re.search(again, stopped[0].out)
    (alone,) = torchrun.run("resume=term", size=1)
    assert alone.code == 1
    assert "was trained by 2 processes, not by 1" in alone.err
    resumed = torchrun.run("resume=term")
    assert codes(resumed) == [0, 0]
    assert "resuming after batch" in resumed[0].out
    same(torchrun.cwd / "term", whole)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", *RUN], "-m is not allowed under torchrun"),
        ([*RUN, "eps=-1", "hydra.run.dir=wrong"], "eps=-1 is not allowed"),
        (["resume=nowhere"], "resume=nowhere is not the directory of a run"),
    ],
    ids=["sweep", "wrong", "gone"],
)
def test_an_error_is_printed_once(torchrun: Torchrun, words: list[str], message: str) -> None:
    before = sorted(torchrun.cwd.iterdir())
    refused = torchrun.run(*words)
    assert codes(refused) == [1, 1]
    both = "".join(answer.said for answer in refused)
    assert re.search(rf"robusttrain: process \d of 2: {message}", both)
    assert both.count(message) == 1
    assert "Traceback" not in both
    assert sorted(torchrun.cwd.iterdir()) == before


# The second process is killed; the first receives the signal of torchrun at an awkward moment: when
# it has noticed, or when it is about to print that and to exit.
KILLED_AWKWARDLY = f"""
{SECOND_DIES}
from robusttrain.api import task
from robusttrain.runtime import distributed
def interrupted(method):
    def call(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return method(*arguments)
    return call
{{place}} = interrupted({{place}})
"""


@pytest.mark.parametrize("place", ["task.log.error", "distributed.exit_message"])
def test_how_to_resume_is_printed_whenever_torchrun_stops_the_others(
    torchrun: Torchrun, place: str
) -> None:
    first = KILLED_AWKWARDLY.format(place=place)
    words = [*RUN, f"hydra.run.dir={place}"]
    left, killed = (running.end() for running in torchrun.start(*words, first=first))
    assert codes([left, killed]) == [1, -signal.SIGKILL]
    assert re.search(rf"resume with: torchrun .*-m robusttrain resume=\S*{place}", left.said)
    assert "robusttrain: process 0 of 2: another process of this run has ended" in left.err
    assert "Traceback" not in left.said


def test_a_killed_process_ends_the_run_which_resumes(torchrun: Torchrun, whole: Path) -> None:
    """With torchrun itself; the second process is killed without warning."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
    killed = subprocess.run(
        [sys.executable, *launch, sys.executable, "-c", KILLED, *RUN, "hydra.run.dir=killed"],
        cwd=torchrun.cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        timeout=PATIENCE,
    )  # fmt: skip
    assert killed.returncode == 1
    # torchrun may have stopped the first process before it noticed.
    lost = "robusttrain: process 0 of 2: another process of this run has ended"
    assert lost in killed.stdout or "stopped by SIGTERM" in killed.stdout
    again = r"resume with: torchrun --nproc_per_node=2 -m robusttrain resume=\S*killed"
    assert re.search(again, killed.stdout)
    revived = torchrun.run("resume=killed")
    assert codes(revived) == [0, 0]
    assert "resuming after batch" in revived[0].out
    same(torchrun.cwd / "killed", whole)


def test_a_training_that_rolls_back_is_killed_again_and_again(torchrun: Torchrun) -> None:
    """One of the two processes is killed where it writes, and the other ends by itself."""
    words = [*RUN, *ROLLING_BACK, "schedule=constant"]
    whole = torchrun.run(*words, "hydra.run.dir=steady", first=TROUBLE)
    assert codes(whole) == [0, 0], whole
    assert whole[0].out.count("restarting epoch 2") == 2
    again, said = [*words, "hydra.run.dir=unsteady"], []
    for kill in kills(least=8):
        answers = torchrun.run(*again, first=f"{TROUBLE}{kill}")
        said.append(answers[0].said)
        if codes(answers) == [0, 0]:
            break
        assert -signal.SIGKILL in codes(answers), answers
        again = ["resume=unsteady"]
    assert len(said) > 2
    assert "Traceback" not in "".join(said)
    assert "resuming after batch" in "".join(said)
    same(torchrun.cwd / "unsteady", torchrun.cwd / "steady")
