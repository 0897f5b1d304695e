"""Each command once in a real process, with nothing replaced in Hydra or at the end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from toys.command_line import PATIENCE

pytestmark = pytest.mark.long

TINY = [
    "dataset=synthetic", "dataset.train_size=96", "dataset.test_size=40", "model=linear",
    "defense=standard", "epochs=1", "evaluation=quick", "evaluation.attacks.pgd.steps=2",
    "evaluation.audit=false", "device=cpu", "report=none",
]  # fmt: skip


def robusttrain(*words: str, cwd: Path) -> str:
    """The output of a command that succeeds, with nothing on the standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "robusttrain", *words],
        cwd=cwd, env=os.environ, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def command(run: Path) -> list[str]:
    """The arguments of a run's command line, from its manifest."""
    words: list[str] = json.loads((run / "manifest.json").read_text())["command"]
    return words[1:]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two jobs, whose mode Hydra finds in the arguments."""
    folder = tmp_path_factory.mktemp("real")
    said = robusttrain(*TINY, "hydra.mode=MULTIRUN", "seed=0,1", "hydra.sweep.dir=s", cwd=folder)
    assert "2 of 2 jobs have finished" in said
    assert said.splitlines()[-1] == str(folder / "s" / "sweep.md")
    return folder / "s"


def test_a_sweep_has_its_jobs_and_their_table(sweep: Path) -> None:
    """`-m` starts the same sweep, and finds all jobs finished."""
    table = pd.read_csv(sweep / "sweep.csv").groupby("job")
    assert table["seed"].first().tolist() == [0, 1]
    assert table["status"].first().tolist() == ["finished"] * 2
    words = [*TINY, "seed=0,1", "hydra.sweep.dir=s"]
    again = robusttrain("-m", *words, cwd=sweep.parent)
    assert [f"job {number} has already finished" in again for number in (0, 1)] == [True] * 2


@pytest.fixture(scope="module")
def unread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose reader ends before its first line, as in `robusttrain ... | head -1`."""
    folder = tmp_path_factory.mktemp("unread")
    running = subprocess.Popen(
        [sys.executable, "-m", "robusttrain", *TINY, "hydra.run.dir=run"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert running.stdout is not None
    running.stdout.close()
    _, complaints = running.communicate(timeout=PATIENCE)
    assert (running.returncode, complaints) == (0, "")
    return folder / "run"


def test_a_reader_that_ends_does_not_end_the_run(unread: Path) -> None:
    assert (unread / "manifest.json").is_file()
    assert command(unread) == [*TINY, "hydra.run.dir=run"]


def test_a_run_is_repeated(unread: Path) -> None:
    said = robusttrain("rerun", "run", cwd=unread.parent)
    assert "the same results as run" in said
    again = unread.with_name("run-rerun")
    assert str(again) in said.splitlines()
    assert command(again) == ["--config-name=config", *TINY, f'hydra.run.dir="{again}"']


def test_a_page_and_its_repetition(tmp_path: Path) -> None:
    words = [word for word in TINY if not word.startswith("report=")]
    page = tmp_path / "run" / "report.html"
    assert f"report: {page}" in robusttrain(*words, "hydra.run.dir=run", cwd=tmp_path).splitlines()
    before = page.read_bytes()
    page.unlink()
    assert robusttrain("report", "run", cwd=tmp_path).split() == ["run/report.html"]
    assert page.read_bytes() == before


def test_a_comparison(sweep: Path) -> None:
    said = robusttrain("compare", "0", "1", cwd=sweep)
    assert "2 runs: worst case in linf, eps 0.1" in said
