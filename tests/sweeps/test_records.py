"""Records of jobs come from a directory that anybody may have written."""

import json
from pathlib import Path

import pytest

from robusttrain.errors import IdentityWarning, InputError
from robusttrain.sweeps import records
from robusttrain.sweeps.job import _refuse_to_mix
from robusttrain.sweeps.records import Job, refuse_exchanged
from toys.runs import as_written


def test_a_record_restores_files_of_its_own_job_only(tmp_path: Path) -> None:
    """It may come from anybody, or from another place."""
    run, of_hydra = tmp_path / "sweep" / "0", tmp_path / "sweep" / "0" / ".hydra"
    of_hydra.mkdir(parents=True)
    (run / "report.csv").touch()
    (of_hydra / "config.yaml").write_text("new")
    written = {
        "/elsewhere/sweep/0/.hydra/config.yaml": "old",
        str(tmp_path / "evil"): "evil",
        "../../evil": "evil",
    }
    before = Job(0, "0", (), config="a: 1", hydra=written)
    job = Job(0, "0", (), config="a: 2", hydra={"config.yaml": "new"})
    with pytest.raises(InputError, match="holds results of another job"):
        _refuse_to_mix(before, job, run, of_hydra, "a=2")
    assert (of_hydra / "config.yaml").read_text() == "old"
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("word", ["attack.steps=20", "attack.steps=${epochs}"])
def test_the_run_of_a_job_has_its_command(tmp_path: Path, word: str) -> None:
    """Those of earlier versions wrote references as their values, and are not compared."""
    run = tmp_path / "0"
    run.mkdir()
    (run / "report.csv").write_text("attack,accuracy\nclean,1\n")
    (run / "manifest.json").write_text(json.dumps({"overrides": ["epochs=1", "attack.steps=10"]}))
    Job(0, "0", ("epochs=1", word), status="finished").save(tmp_path)
    with pytest.warns(IdentityWarning):
        refuse_exchanged(tmp_path)
    as_written(run)
    with pytest.raises(InputError, match=r"is the run of another job: its record has attack.steps"):
        refuse_exchanged(tmp_path)
    Job(0, "0", ("attack.steps=10",), status="finished").save(tmp_path)
    refuse_exchanged(tmp_path)


def ended(status: str, seconds: float | None = None) -> Job:
    return Job(0, "0", (), status=status, seconds=seconds)


@pytest.mark.parametrize(
    ("jobs", "words"),
    [
        ([ended("running"), ended("waiting")], ""),
        ([ended("finished", 10), ended("failed", 1)], ""),
        # A failed job has no time to go by.
        ([ended("finished", 10), ended("failed", 1), ended("running"), ended("waiting")], "20 s"),
        ([ended("finished", 20), ended("finished", 40), *[ended("unfinished")] * 8], "4 min"),
        ([ended("finished", 600), *[ended("running")] * 2, *[ended("waiting")] * 58], "5 h"),
        ([ended("finished", 119), ended("running")], "119 s"),
        ([ended("finished", 121), ended("running")], "2 min"),
    ],
)
def test_the_time_left_is_that_of_finished_jobs(jobs: list[Job], words: str) -> None:
    assert records.time_left(jobs) == (f"about {words} left" if words else "")


@pytest.mark.parametrize(
    ("states", "planned", "words"),
    [
        (["finished"], 1, "1 of 1 jobs has finished"),
        (["finished"] * 2, 0, "2 of 2 jobs have finished"),
        (["finished", "unfinished"], 6, "1 of 6 jobs has finished, 1 stopped, 4 not started"),
        (["failed", "failed"], 3, "0 of 3 jobs have finished, 2 failed, 1 not started"),
    ],
)
def test_all_planned_jobs_are_counted(states: list[str], planned: int, words: str) -> None:
    assert records.counted([ended(state) for state in states], planned) == words
