"""The session of a sweep: opened around Hydra, and again in each process of a launcher."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig

from robusttrain.sweeps import session
from robusttrain.sweeps.callback import Sweeps
from robusttrain.sweeps.records import Job
from robusttrain.sweeps.session import Session, SweepState, opened, present


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepState:
    monkeypatch.chdir(Path.cwd())
    jobs = (Job(0, "", ("seed=0",)), Job(1, "", ("seed=1",)))
    return SweepState(tmp_path, tmp_path / "sweep", jobs, ("seed",), "hydra/launcher=ray")


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A process without a session, before and after the test."""
    before = session._present.set(None)
    yield
    session._present.reset(before)


def test_a_session_exists_only_in_its_block() -> None:
    with opened(lambda config: {}) as one:
        assert present() is one
        with opened(lambda config: {}) as inner:
            assert present() is inner
        assert present() is one
    assert present() is None


def test_a_worker_opens_the_session_of_its_sweep(sweep: SweepState) -> None:
    """The callback is sent there with the job and the plan, but without anything that runs."""
    callback = Sweeps()
    callback.sweep = sweep
    there = pickle.loads(pickle.dumps(callback))
    assert vars(there) == {"compared": (None, None), "sweep": sweep}
    # A worker may get several jobs.
    for _ in range(2):
        there.on_job_start(DictConfig({}))
        assert present() == Session(sweep, in_worker=True, view=present().view)  # type: ignore[union-attr]
        assert Path.cwd() == sweep.cwd


def test_a_job_in_the_process_of_the_user_leaves_its_session_alone(sweep: SweepState) -> None:
    callback, here = Sweeps(), Path.cwd()
    with opened(lambda config: {}) as one:
        callback.sweep = one.sweep = sweep
        callback.on_job_start(DictConfig({}))
        assert present() is one
        assert not one.in_worker
    assert Path.cwd() == here


def test_a_single_run_has_no_sweep() -> None:
    Sweeps().on_job_start(DictConfig({}))
    assert present() is None
