"""Runs under torchrun: one writer, signals, refusals, and a process that is killed."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_resume import RUN as ALONE
from test_resume import same

pytestmark = pytest.mark.long

# Two processes with half a batch each, and images of which one has one more.
RUN = [*ALONE, "batch_size=32", "evaluation.samples=21"]

KILLED = """
import os, signal
from robusttrain.__main__ import main
from robusttrain.attacks.pgd import PGD
search, calls = PGD.search, []
def searching(self, *arguments):
    calls.append(0)
    if len(calls) == 30 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return search(self, *arguments)
PGD.search = searching
main()
"""

# Imports once, then forks processes as torchrun would start them.
DRIVER = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
import scipy.stats
from torch.distributed import TCPStore
from robusttrain import cli
from robusttrain.__main__ import main

outside = dict(os.environ)
os.environ |= {
    "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "0",
}
stores = []

def start(name, arguments, size=2):
    stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    os.environ |= {"WORLD_SIZE": str(size), "MASTER_PORT": str(stores[-1].port)}
    return [begin(f"{name}.{rank}", arguments, rank) for rank in range(size)]

def begin(name, arguments, rank):
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    with open(name, "ab", 0) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    sys.argv[1:] = arguments
    code = 1
    try:
        main()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else print(left.code) or 1
    finally:
        sys.stdout.flush()
        os._exit(code)

def end(children):
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

run = json.loads(sys.argv[1])
codes = {"whole": end(start("whole.txt", [*run, "hydra.run.dir=whole"]))}
children = start("term.txt", [*run, "hydra.run.dir=term"])
while not Path("term", "checkpoint.pt").exists():
    time.sleep(0.001)
# Only one of them is told.
os.kill(children[1], signal.SIGTERM)
codes["told"] = end(children)
codes["one"] = end(start("one.txt", ["resume=term"], size=1))
codes["resumed"] = end(start("resumed.txt", ["resume=term"]))
codes["sweep"] = end(start("sweep.txt", ["-m", *run]))
codes["wrong"] = end(start("wrong.txt", [*run, "eps=-1", "hydra.run.dir=wrong"]))
codes["gone"] = end(start("gone.txt", ["resume=nowhere"]))
# torchrun itself; the second process is killed, with no time for a word.
launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
with open("killed.txt", "w") as file:
    codes["killed"] = subprocess.run(
        [sys.executable, *launch, sys.executable, "-c", sys.argv[2], *run, "hydra.run.dir=killed"],
        env=outside, stdout=file, stderr=file,
    ).returncode
codes["revived"] = end(start("revived.txt", ["resume=killed"]))
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("driven")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(RUN), KILLED],
        cwd=folder, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def said(folder: Path, name: str) -> list[str]:
    return [(folder / f"{name}.txt.{rank}").read_text() for rank in range(2)]


def test_one_process_writes_and_speaks_for_all(driven: tuple[Path, dict[str, Any]]) -> None:
    folder, codes = driven
    assert codes["whole"] == [0, 0]
    first, second = said(folder, "whole")
    assert first.count("epoch 6/6") == 1
    assert second == ""
    made = {path.name for path in folder.iterdir() if path.is_dir()}
    assert made == {"whole", "term", "killed"}
    assert json.loads((folder / "whole/manifest.json").read_text())["processes"] == 2
    assert not list((folder / "whole").glob("evaluation.partial*"))
    assert (folder / "whole/robusttrain.log").read_text().count("epoch 6/6") == 1
    assert len(pd.read_csv(folder / "whole/samples.csv")) == 21


def test_processes_that_are_told_to_stop_leave_after_the_same_batch_and_go_on(
    driven: tuple[Path, dict[str, Any]],
) -> None:
    folder, codes = driven
    assert codes["told"] == [143, 143]
    assert re.search(
        r"stopped by SIGTERM: torchrun .*-m robusttrain resume=", said(folder, "term")[0]
    )
    assert (codes["one"], codes["resumed"]) == ([1], [0, 0])
    assert "was trained by 2 processes, not by 1" in (folder / "one.txt.0").read_text()
    assert "going on behind batch" in said(folder, "resumed")[0]
    same(folder / "term", folder / "whole")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sweep", "-m is not allowed under torchrun"),
        ("wrong", "eps=-1 is not allowed"),
        ("gone", "resume=nowhere is no directory of a run"),
    ],
)
def test_a_refusal_is_said_once(
    name: str, message: str, driven: tuple[Path, dict[str, Any]]
) -> None:
    folder, codes = driven
    assert codes[name] == [1, 1]
    both = "".join(said(folder, name))
    assert re.search(rf"robusttrain: process \d of 2: {message}", both)
    assert both.count(message) == 1
    assert "Traceback" not in both


def test_a_process_that_is_killed_ends_the_job_and_it_goes_on(
    driven: tuple[Path, dict[str, Any]],
) -> None:
    folder, codes = driven
    assert codes["killed"] == 1
    told = (folder / "killed.txt").read_text()
    # torchrun may have told the first process to stop before it has noticed.
    lost = "robusttrain: process 0 of 2: another process of this run has ended"
    assert lost in told or "stopped by SIGTERM" in told
    assert re.search(r"torchrun --nproc_per_node=2 -m robusttrain resume=\S*killed goes on", told)
    assert codes["revived"] == [0, 0]
    assert "going on behind batch" in said(folder, "revived")[0]
    same(folder / "killed", folder / "whole")
