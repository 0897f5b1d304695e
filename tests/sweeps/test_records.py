"""Records of jobs come from a directory that anybody may have written."""

from pathlib import Path

import pytest

from robusttrain.errors import InputError
from robusttrain.sweeps.job import _refuse_to_mix
from robusttrain.sweeps.records import Job


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
