"""Sweeps whose jobs run in other processes, and searches: results, interrupts and repetitions."""

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from robusttrain.checkpoints import checkpoint as checkpoints
from robusttrain.config.error_messages import explain
from robusttrain.errors import InputError
from robusttrain.runtime import signals
from robusttrain.runtime.signals import Interrupted
from robusttrain.sweeps import launchers, records
from robusttrain.sweeps.records import Job
from toys.command_line import Answer, CommandLine, Running
from toys.kills import until_done
from toys.runs import RUN, finished, same

pytestmark = pytest.mark.long

TINY = [
    "dataset=synthetic", "model=linear", "defense=standard", "epochs=1", "evaluation=quick",
    "evaluation.audit=false", "evaluation.samples=20", "device=cpu",
]  # fmt: skip
# Long enough to be interrupted.
LONG = [*TINY, "epochs=60", "stages=[train]"]

PACKAGES = {
    "joblib": ["joblib", "hydra_plugins.hydra_joblib_launcher"],
    "ray": ["ray", "hydra_plugins.hydra_ray_launcher"],
    "submitit": ["submitit", "hydra_plugins.hydra_submitit_launcher"],
    "optuna": ["optuna", "hydra_plugins.hydra_optuna_sweeper"],
}


def needs(engine: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(engine not in INSTALLED, reason=f"{engine} is not installed")


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


INSTALLED = [engine for engine, modules in PACKAGES.items() if all(map(installed, modules))]

JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
# A cluster of this machine with one core.
RAY = [
    "hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=1",
    "+hydra.launcher.ray.init.include_dashboard=false",
]  # fmt: skip
SEARCH = [
    "-m", *TINY, "stages=[train]", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=8",
    "optimizer.lr=choice(-1,0.001,0.1)", "eps=0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launchers")


@pytest.fixture(scope="module")
def begin(command_line: CommandLine, place: Path) -> Callable[..., Running]:
    # Ray writes a key of its cluster to the home directory.
    return partial(command_line.start, cwd=place, COLUMNS="80", HOME=str(place))


@pytest.fixture(scope="module")
def whole(begin: Callable[..., Running]) -> Path:
    """An uninterrupted run, to compare interrupted ones with."""
    return begin(*LONG, "seed=1", "optimizer.lr=0.01").end().run_dir


def same_weights(one: Path, other: Path) -> None:
    ours, theirs = (checkpoints.load(run / "best.pt").model for run in (one, other))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def is_whole(folder: Path, number: int, answer: Answer) -> None:
    """Assert that a job of the sweep in `folder` has all the files of a run."""
    assert f"job {number} finished  clean " in answer.out
    table = pd.read_csv(folder / "sweep.csv")
    report = pd.read_csv(folder / str(number) / "report.csv")
    for column in ("attack", "accuracy"):
        assert table[table["job"] == number][column].tolist() == report[column].tolist()
    manifest = json.loads((folder / str(number) / "manifest.json").read_text())
    assert manifest["command"][:2] == ["robusttrain", "-m"]
    assert manifest["threads"] == 1
    assert (folder / str(number) / "robusttrain.log").stat().st_size > 0


@needs("ray")
def test_ray_runs_the_jobs_of_a_sweep_and_skips_what_is_finished(
    begin: Callable[..., Running], place: Path
) -> None:
    """Every second job fails, and the others have all the files of a run."""
    command = [*TINY, "optimizer.lr=0.01,-1", "hydra.sweep.dir=ray"]
    # The first half of the jobs, without the launcher.
    assert begin("-m", "seed=0", *command).end().code == 1
    answer = begin("-m", "seed=0,1", *command, *RAY).end()
    assert answer.code == 1
    assert "Traceback" not in answer.err
    assert answer.err.splitlines()[-1].startswith("robusttrain: optimizer.lr=-1")
    table = pd.read_csv(place / "ray" / "sweep.csv").groupby("job")
    assert table["status"].first().tolist() == ["finished", "failed"] * 2
    assert table["seed"].first().tolist() == [0, 0, 1, 1]
    assert "4 jobs: 2 finished, 2 failed" in (place / "ray" / "sweep.md").read_text()
    for number in (1, 3):
        assert f"job {number} failed: optimizer.lr=-1" in answer.err
    assert "job 0 has already finished" in answer.out
    assert "job 2: seed=1 optimizer.lr=0.01" in answer.out
    is_whole(place / "ray", 2, answer)


@needs("joblib")
def test_joblib_runs_the_jobs_of_a_sweep_and_stopped_jobs_resume(
    begin: Callable[..., Running], place: Path, whole: Path
) -> None:
    """Two jobs fail, two finish, and two are stopped.

    One of these resumes on its own, with `resume=`, and the other when the sweep is repeated.
    """
    words = [*TINY, "epochs=-1,1,60", "optimizer.lr=0.01", "seed=0,1"]
    command = ["-m", *words, "hydra.sweep.dir=long"]
    running = begin(*command, *JOBLIB)
    running.until("long/4/checkpoint.pt", "long/5/checkpoint.pt")
    stopped = running.signal(signal.SIGTERM).end()
    assert stopped.code == 143
    assert "Traceback" not in stopped.err
    for number in (0, 1):
        assert f"job {number} failed: epochs=-1" in stopped.err
    assert "job 3: epochs=1 seed=1" in stopped.out
    for number in (4, 5):
        assert f"job {number} was stopped by SIGTERM" in stopped.out
    is_whole(place / "long", 3, stopped)
    resumed, again = begin("resume=long/4").end(), begin(*command).end()
    assert resumed.code == 0
    assert again.code == 1
    assert again.err.splitlines()[-1].startswith("robusttrain: epochs=-1")
    for number in (2, 3, 4):
        assert f"job {number} has already finished" in again.out
    assert "job 5 resumes: epochs=60 seed=1" in again.out
    assert "resuming after batch" in again.out
    table = pd.read_csv(place / "long" / "sweep.csv")
    jobs = table.groupby("job")
    assert jobs["status"].first().tolist() == ["failed"] * 2 + ["finished"] * 4
    assert jobs["seed"].first().tolist() == [0, 1] * 3
    assert table["error"].dropna().str.startswith("epochs=-1").tolist() == [True] * 2
    assert "6 jobs: 4 finished, 2 failed" in (place / "long" / "sweep.md").read_text()
    same_weights(place / "long" / "5", whole)


def worker(folder: Path) -> int:
    """The process that submitit's own process in `folder` has started for its job."""
    (controller,) = [path.name for path in folder.iterdir() if path.name.isdigit()]
    return int(Path(f"/proc/{controller}/task/{controller}/children").read_text())


@needs("submitit")
@pytest.mark.skipif(sys.platform != "linux", reason="looks for a process in /proc")
def test_submitit_resumes_a_preempted_job(
    begin: Callable[..., Running], place: Path, whole: Path
) -> None:
    """A job whose time ends writes a checkpoint, is queued again, and resumes."""
    command = ["-m", *LONG, "optimizer.lr=0.01", "seed=1", "hydra.sweep.dir=preempted"]
    folder = place / "preempted"
    running = begin(*command, "hydra/launcher=submitit_local").until("preempted/0/checkpoint.pt")
    os.kill(worker(folder / ".submitit"), signal.SIGUSR2)
    first = running.end()
    assert first.code == 0, first.err
    assert "job 0 resumes" in first.out
    assert "1 of 1 jobs has finished" in first.out
    assert "resuming after batch" in (folder / "0" / "robusttrain.log").read_text()
    same_weights(folder / "0", whole)
    assert "job 0 has already finished" in begin(*command).end().out


@needs("joblib")
def test_a_sweep_is_killed_with_its_workers(
    begin: Callable[..., Running], place: Path, whole: Path
) -> None:
    command = ["-m", *LONG, "optimizer.lr=0.01", "seed=0,1", "hydra.sweep.dir=killed"]
    running = begin(*command, *JOBLIB)
    running.until("killed/0/checkpoint.pt", "killed/1/checkpoint.pt")
    main = psutil.Process(running.pid)
    for process in (main, *main.children(recursive=True)):
        process.kill()
    assert running.end().code == -signal.SIGKILL
    again = finished(begin(*command))
    assert again.out.count("resuming after batch") == 2
    same_weights(place / "killed" / "1", whole)
    assert set(pd.read_csv(place / "killed" / "sweep.csv")["status"]) == {"finished"}


def test_a_sweep_is_killed_again_and_again(begin: Callable[..., Running], place: Path) -> None:
    command = ["-m", *RUN, "epochs=1", "seed=0,1"]
    steady, unsteady = place / "steady", place / "unsteady"
    finished(begin(*command, "hydra.sweep.dir=steady"))
    said = until_done(
        lambda kill: begin(*command, "hydra.sweep.dir=unsteady", first=kill), least=12
    )
    assert len(said) > 2
    assert any("resuming after batch" in each for each in said)
    for job in ("0", "1"):
        same(unsteady / job, steady / job)
    measured = ["seconds", *records.COSTS]
    one, other = (pd.read_csv(sweep / "sweep.csv", dtype=str) for sweep in (steady, unsteady))
    pd.testing.assert_frame_equal(one.drop(columns=measured), other.drop(columns=measured))
    assert (unsteady / "sweep.md").read_text() == (steady / "sweep.md").read_text()


@needs("optuna")
def test_optuna(begin: Callable[..., Running], place: Path) -> None:
    """A search reports the largest figure of a validation split; a failed trial does not end it."""
    search = [*SEARCH, "hydra.sweep.dir=search"]
    first, again = begin(*search).end(), begin(*search).end()
    assert first.code == again.code == 0, first.err
    table = pd.read_csv(place / "search" / "sweep.csv")
    assert set(table["status"]) == {"finished", "failed"}
    assert (table["status"] == "failed").tolist() == (table["optimizer.lr"] == -1).tolist()
    for number, row in table[table["status"] == "finished"].set_index("job").iterrows():
        epochs = pd.read_csv(place / "search" / str(number) / "train.csv")
        assert row["validation"] == epochs["val_robust_accuracy"].max()
        assert f"job {number} has already finished: optimizer.lr=0." in again.out
    assert table["validation"].min() < table["validation"].max()
    best = OmegaConf.load(place / "search" / "optimization_results.yaml")
    assert round(best.best_value, 6) == table["validation"].max()
    assert "best on the validation split: job " in first.out


@needs("optuna")
def test_a_blind_search_is_refused(begin: Callable[..., Running], place: Path) -> None:
    refused = begin(*SEARCH, "hydra.sweep.dir=blind", "dataset.validation=0").end()
    assert refused.code == 1
    assert refused.err.splitlines()[-1].endswith("dataset.validation=0 is not allowed")
    assert not (place / "blind").exists()


# --- without other processes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "jobs", "processes", "threads"),
    [
        (-1, 3, 3, 5), (-1, 100, 16, 1), (4, 100, 4, 4), (4, 2, 2, 8), (-1, 0, 16, 1),
        (-2, 100, 15, 1), (40, 100, 40, 1), (-1, 1, 1, 16),
    ],
)  # fmt: skip
def test_jobs_share_the_cores(
    asked: int, jobs: int, processes: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launchers, "cores", lambda: 16)
    assert launchers.processes(asked, jobs) == processes
    assert launchers.share(processes) == threads


@pytest.mark.parametrize(("given", "threads"), [(None, "5"), ("2", "2"), ("8", "5")])
def test_jobs_use_no_more_threads_than_the_user_allows(
    given: str | None, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launchers, "cores", lambda: 16)
    monkeypatch.setenv("OMP_NUM_THREADS", given or "")
    monkeypatch.setenv("MKL_NUM_THREADS", "")
    choices = {"hydra/launcher": "joblib"}
    hydra = {"runtime": {"choices": choices}, "launcher": {"n_jobs": -1}}
    config = OmegaConf.create({"hydra": hydra})
    assert launchers.prepare_launcher(config, 3)
    assert config.hydra.launcher.n_jobs == 3
    assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == threads


@pytest.mark.parametrize(("address", "sized"), [(None, False), ("auto", True)])
def test_an_existing_cluster_keeps_its_size(
    address: str | None, sized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray refuses a size for it, which the launcher would set if the key were missing."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    hydra = {
        "runtime": {"choices": {"hydra/launcher": "ray"}},
        "launcher": {"ray": {"init": {"address": address}}},
    }
    config = OmegaConf.create({"hydra": hydra})
    OmegaConf.set_struct(config, True)
    assert launchers.prepare_launcher(config, 3)
    assert ("object_store_memory" in config.hydra.launcher.ray.init) == sized
    assert config.hydra.launcher.ray.init.get("object_store_memory") is None


def test_no_process_is_refused() -> None:
    with pytest.raises(InputError, match=r"hydra.launcher.n_jobs=0 is not allowed"):
        launchers.processes(0, 3)


@pytest.mark.parametrize(
    ("missing", "extra"),
    [
        ("hydra/launcher/joblib", "joblib"), ("hydra/launcher/ray", "ray"),
        ("hydra/launcher/submitit_slurm", "slurm"), ("hydra/sweeper/optuna", "optuna"),
        ("hydra/sweeper/sampler/random", "optuna"),
    ],
)  # fmt: skip
def test_a_missing_engine_names_its_extra(missing: str, extra: str) -> None:
    for options in (["basic"], None):
        message = explain(MissingConfigException("long\nand winding", missing, options))
        assert message.endswith(f" needs the extra: pip install 'robusttrain[{extra}]'")
    assert "basic" in explain(MissingConfigException("", "hydra/launcher/other", ["basic"]))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dataset": {"validation": 0}}, "dataset.validation=0"),
        ({"training": {"validation_attack": None}}, "training.validation_attack=null"),
        ({"stages": ["evaluate"]}, "stages must contain train"),
    ],
)
def test_a_search_needs_a_figure(change: dict[str, Any], named: str) -> None:
    whole = {
        "dataset": {"validation": 0.1}, "training": {"validation_attack": {"steps": 1}},
        "stages": ["train"], "hydra": {"runtime": {"choices": {"hydra/sweeper": "optuna"}}},
    }  # fmt: skip
    launchers.check_search(OmegaConf.create(whole))
    with pytest.raises(InputError, match=named):
        launchers.check_search(OmegaConf.create(whole | change))


@pytest.fixture
def handlers() -> Iterator[list[int]]:
    """The signals that a cluster's handler of SIGUSR2 gets; handlers are restored afterwards."""
    heard: list[int] = []
    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {signum: signal.getsignal(signum) for signum in watched}
    signal.signal(signal.SIGUSR2, lambda signum, frame: heard.append(signum))
    with signals.handle_signals():
        yield heard
    signals._signals.received, signals._signals.deferred = None, False
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_the_handler_of_a_cluster_runs_after_the_job_has_stopped(handlers: list[int]) -> None:
    def stopped() -> None:
        with signals.handle_in_worker():
            with signals.deferred() as signalled:
                signal.raise_signal(signal.SIGUSR2)
                assert signalled() == signal.SIGUSR2
                assert handlers == []
            signals.raise_pending()

    with pytest.raises(Interrupted, match="SIGUSR2"):
        stopped()
    assert handlers == [signal.SIGUSR2]


def test_a_process_that_got_a_signal_starts_no_further_job(handlers: list[int]) -> None:
    with signals.handle_in_worker():
        signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM"), signals.handle_in_worker():
        raise AssertionError("another job has begun")


def test_a_run_finds_the_record_that_it_has_in_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "sweep" / "a" / "0").mkdir(parents=True)
    job = Job(0, "a/0", ("seed=1",))
    job.save(tmp_path / "sweep")
    assert records.record_of(tmp_path / "sweep" / "a" / "0") == (tmp_path / "sweep", job)
    assert records.record_of(tmp_path / "sweep" / "a") is None
