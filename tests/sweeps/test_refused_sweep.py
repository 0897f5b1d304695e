"""Sweeps that cannot start, or none of whose jobs does any work."""

from pathlib import Path

import pytest

from toys.command_line import CommandLine
from toys.runs import SAYS_LOADED, listing

SMALL = ["-m", "dataset=synthetic", "model=linear", "defense=standard", "epochs=1", "device=cpu",
         "evaluation=quick", "evaluation.audit=false", "hydra.sweep.dir=s"]  # fmt: skip


@pytest.mark.parametrize("place", [[], ["hydra.sweep.dir=a/b"]], ids=["default", "given"])
def test_a_sweep_without_any_work_leaves_nothing(
    place: list[str], command_line: CommandLine, tmp_path: Path
) -> None:
    words = [*SMALL[:-1], "eps=-1,-2", *place]
    answer = command_line.run(*words, cwd=tmp_path, first=SAYS_LOADED)
    assert answer.code == 1
    for number, eps in enumerate((-1, -2)):
        assert f"robusttrain: job {number} failed: eps={eps} is not allowed" in answer.err
    assert "Traceback" not in answer.err
    assert "LOADED" not in answer.out
    assert listing(tmp_path) == []


def test_a_damaged_record_is_named(command_line: CommandLine, tmp_path: Path) -> None:
    words = [*SMALL, "seed=0", "stages=[train]"]
    assert command_line.run(*words, cwd=tmp_path).code == 0
    (record,) = (tmp_path / "s" / ".jobs").glob("*.json")
    record.write_text(record.read_text()[:40])
    answer = command_line.run(*words, cwd=tmp_path)
    assert answer.code == 1
    assert f"{record} is damaged" in answer.err
    assert "Traceback" not in answer.err


def test_a_search_names_its_key(command_line: CommandLine, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=1", "optimizer.lr=interval(1,0)"]
    answer = command_line.run(*SMALL, *search, cwd=tmp_path)
    assert answer.code == 1
    assert "hydra/sweeper=optuna over optimizer.lr ended with ValueError" in answer.err
