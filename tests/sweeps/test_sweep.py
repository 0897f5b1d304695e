"""Sweeps as users see them: their results, failures and repetitions."""

import re
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from robusttrain.errors import InputError
from robusttrain.exit_codes import ExitCode
from robusttrain.report.terminal import Terminal
from robusttrain.runs.lock import alone_in
from robusttrain.sweeps import callback, records
from robusttrain.sweeps import job as sweep
from robusttrain.sweeps.session import SweepState
from toys.command_line import Answer, CommandLine, Running

SMOKE = [
    "experiment=smoke", "epochs=1", "model=linear", "evaluation.audit=false",
    "evaluation.attacks.pgd.steps=3", "evaluation.attacks.apgd_ce.steps=5",
    "hydra.sweep.dir=sweep", "-m", "seed=0,1",
]  # fmt: skip
BAD = [*SMOKE, "optimizer.lr=0.01,-1"]


@dataclass
class Left:
    """The output of a command line, and the files of the sweep at that time."""

    answer: Answer
    table: pd.DataFrame
    files: dict[str, int | str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def lefts(command_line: CommandLine, place: Path) -> list[Left]:
    """A sweep in which half of the jobs fail, the same sweep again, and another in its place."""

    def left(*words: str) -> Left:
        answer = command_line.run(*words, cwd=place, COLUMNS="80")
        texts = [*place.glob("sweep/*/.hydra/overrides.yaml"), place / "sweep" / "sweep.md"]
        files = {str(path.relative_to(place)): path.read_text() for path in texts}
        reports = place.glob("sweep/*/report.csv")
        times = {str(path.relative_to(place)): path.stat().st_mtime_ns for path in reports}
        return Left(answer, pd.read_csv(place / "sweep" / "sweep.csv"), times | files)

    return [left(*BAD), left(*BAD), left(*SMOKE, "optimizer.lr=0.02,0.03")]


def test_a_sweep_with_failures_finishes_and_reports_them(lefts: list[Left]) -> None:
    first = lefts[0]
    assert first.answer.code == 1
    assert "Traceback" not in first.answer.err
    assert first.answer.err.splitlines()[-1].startswith("robusttrain: optimizer.lr=-1")
    table = first.table
    assert list(table) == [
        "job", "seed", "optimizer.lr", "attack", "attack_norm", "attack_eps", "n",
        "accuracy", "ci_low", "ci_high", "audit", "validation", "training_images_per_second",
        "training_passes", "training_peak_memory_mib", "evaluation_images_per_second",
        "evaluation_passes", "evaluation_peak_memory_mib", "status", "seconds", "error",
    ]  # fmt: skip
    finished, failed = table[table["status"] == "finished"], table[table["status"] == "failed"]
    assert failed["job"].tolist() == [1, 3]
    assert failed["error"].str.startswith("optimizer.lr=-1").all()
    assert finished["job"].unique().tolist() == [0, 2]
    attacks = ["clean", "uniform", "fgsm", "pgd", "apgd_ce", "worst_case"]
    assert finished["attack"].tolist() == attacks * 2
    assert finished["seed"].tolist() == [0] * 6 + [1] * 6


def test_the_table_has_the_figures_of_the_reports(lefts: list[Left], place: Path) -> None:
    table = lefts[0].table
    for number in (0, 2):
        report = pd.read_csv(place / "sweep" / str(number) / "report.csv")
        rows = table[table["job"] == number]
        for key in ("n", "accuracy", "ci_low", "ci_high"):
            assert rows[key].tolist() == report[key].tolist()
        assert rows["seed"].tolist() == report["seed"].tolist()


def test_the_summary_has_a_line_for_each_setting(lefts: list[Left]) -> None:
    text = str(lefts[0].files["sweep/sweep.md"])
    assert "4 jobs: 2 finished, 2 failed" in text
    accuracy = lefts[0].table.query("attack == 'clean'")["accuracy"]
    assert f"| 0.01 | 2 | {100 * accuracy.mean():.2f} ± {100 * accuracy.std():.2f} |" in text
    assert "| 3 | 1 | -1 | optimizer.lr=-1.0 is not allowed" in text


def test_piped_output_is_plain_lines(lefts: list[Left], place: Path) -> None:
    out = lefts[0].answer.out
    assert "\x1b" not in out
    assert "\r" not in out
    assert "HYDRA" not in out
    for number in (0, 2):
        assert f"job {number}: seed={number // 2} optimizer.lr=0.01\n" in out
        assert re.search(rf"job {number} finished  clean [\d.]+%  worst case [\d.]+%", out)
    assert "2 of 4 jobs have finished, 2 failed" in out
    assert out.splitlines()[-1] == str(place / "sweep" / "sweep.md")


def test_a_stopped_sweep_resumes_with_the_command_that_it_prints(
    command_line: CommandLine, tmp_path: Path
) -> None:
    """The second of six jobs is stopped, in an epoch that would take minutes."""
    words = [*SMOKE[:-3], "-m", "seed=0,1,2", "dataset.train_size=128,200000", "epochs=1"]
    running = command_line.start(*words, cwd=tmp_path)
    (sweep_dir,) = _until_second_job(running, tmp_path)
    stopped = running.signal(signal.SIGINT).end()
    assert stopped.code == ExitCode.interrupted
    assert "stopped by SIGINT\n" in stopped.out
    assert "1 of 6 jobs has finished, 1 stopped, 4 not started\n" in stopped.out
    advice = stopped.out.splitlines()[-1]
    said, _, command = advice.partition(": robusttrain ")
    assert said == "resume the sweep with"
    assert shlex.split(command) == [*words, f"hydra.sweep.dir={sweep_dir}"]
    # As soon as the finished job has been passed over.
    again = command_line.start(*shlex.split(command), cwd=tmp_path)
    while "job 1 resumes: " not in again.said()[0]:
        assert again.poll() is None, again.said()
        time.sleep(0.01)
    assert "job 0 has already finished: " in again.said()[0]
    assert again.signal(signal.SIGINT).end().code == ExitCode.interrupted


def _until_second_job(running: Running, folder: Path) -> list[Path]:
    while not [*folder.glob("outputs/sweeps/*/*/1/best.pt")]:
        assert running.poll() is None, running.said()
        time.sleep(0.01)
    return [*folder.glob("outputs/sweeps/*/*")]


def test_the_same_sweep_again_skips_what_is_finished(lefts: list[Left]) -> None:
    first, again = lefts[:2]
    assert again.answer.code == 1
    for number in (0, 2):
        assert f"job {number} has already finished" in again.answer.out
        assert f"job {number + 1} failed: optimizer.lr=-1" in again.answer.err
    assert "epoch 1/1" in first.answer.out
    assert "epoch 1/1" not in again.answer.out
    reports = [{k: v for k, v in a.files.items() if "report" in k} for a in (first, again)]
    assert reports[0] == reports[1]
    kept = [left.table.drop(columns="seconds") for left in (first, again)]
    pd.testing.assert_frame_equal(*kept)


def test_another_sweep_in_its_place_mixes_nothing(lefts: list[Left]) -> None:
    """Jobs are refused if another job's results are in their directory; the others run."""
    again, other = lefts[1:]
    assert other.answer.code == 1
    for number in (0, 2):
        assert f"job {number} failed: " in other.answer.err
        assert f"sweep/{number} holds results of another job" in other.answer.err
        for key in (f"sweep/{number}/report.csv", f"sweep/{number}/.hydra/overrides.yaml"):
            assert other.files[key] == again.files[key]
        assert f"job {number + 1} finished" in other.answer.out
    learning_rates = other.table.groupby("job")["optimizer.lr"].unique().tolist()
    assert [list(rates) for rates in learning_rates] == [[0.01], [0.03]] * 2


# --- a job, without a run ------------------------------------------------------------------------


def test_exchanged_results_are_refused_before_any_job(
    command_line: CommandLine, lefts: list[Left], place: Path, tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(place, tmp_path / "place")) / "sweep"
    again = partial(command_line.run, *BAD, cwd=whole.parent)
    report = (whole / "0" / "report.csv").read_bytes()
    shutil.copy(whole / "2" / "report.csv", whole / "0")
    assert "0 holds results of several runs, or edited ones" in again().err
    (whole / "0" / "report.csv").write_bytes(report)
    for old, new in (("0", "x"), ("2", "0"), ("x", "2")):
        (whole / old).rename(whole / new)
    answer = again()
    assert answer.code == 1
    assert answer.err == (
        f"robusttrain: {whole / '0'} is the run of another job: its record has seed=0; put it "
        f"back, or remove it\n"
    )
    assert answer.out == ""


@pytest.fixture
def attempt(tmp_path: Path) -> Callable[..., float | None]:
    """Run a job of a sweep whose work is a function."""

    def run(work: Callable[[], float | None], **config: object) -> float | None:
        run_dir = tmp_path / "0"
        (run_dir / ".hydra").mkdir(parents=True, exist_ok=True)
        words = [f"{key}={value}" for key, value in config.items()]
        (run_dir / ".hydra" / "overrides.yaml").write_text(" ".join(words))
        chosen = OmegaConf.create(
            {
                "runtime": {"output_dir": str(run_dir)},
                "job": {"num": 0},
                "overrides": {"task": words},
                "output_subdir": ".hydra",
            }
        )
        terminal = Terminal(Console(file=StringIO()))
        state, given = SweepState(cwd=tmp_path, directory=tmp_path), OmegaConf.create(config)
        return sweep.recorded(state, chosen, given, lambda _: work(), terminal)

    return run


def never() -> float:
    raise AssertionError("the job was repeated")


def works(tmp_path: Path, result: float | None = 0.25) -> Callable[[], float | None]:
    def work() -> float | None:
        (tmp_path / "0" / "manifest.json").touch()
        return result

    return work


def test_a_finished_job_returns_its_result_again(
    tmp_path: Path, attempt: Callable[..., float | None]
) -> None:
    assert attempt(works(tmp_path), seed=1) == 0.25
    assert attempt(never, seed=1) == 0.25


def test_a_failed_job_is_repeated_where_it_was(
    tmp_path: Path, attempt: Callable[..., float | None], capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> float:
        (tmp_path / "0" / "manifest.json").touch()
        raise InputError("seed=1 is\nnot lucky")

    with pytest.raises(InputError):
        attempt(fails, seed=1)
    assert capsys.readouterr().err.startswith("robusttrain: job 0 failed: seed=1 is")
    (failed,) = records.read_jobs(tmp_path)
    assert (failed.status, failed.error) == ("failed", "seed=1 is not lucky")
    assert attempt(works(tmp_path, None), seed=1) is None
    (finished,) = records.read_jobs(tmp_path)
    assert (finished.status, finished.error) == ("finished", "")


def test_an_unexpected_error_is_recorded_with_its_type(
    tmp_path: Path, attempt: Callable[..., float | None]
) -> None:
    with pytest.raises(ZeroDivisionError):
        attempt(lambda: 1 / 0, seed=1)
    assert pd.read_csv(tmp_path / "sweep.csv")["error"].tolist() == [
        "ZeroDivisionError: division by zero"
    ]


def test_a_job_that_was_stopped_is_repeated(
    tmp_path: Path, attempt: Callable[..., float | None]
) -> None:
    def stopped() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(stopped, seed=1)
    assert records.read_jobs(tmp_path)[0].status == "unfinished"
    assert attempt(works(tmp_path), seed=1) == 0.25


def test_a_job_that_still_runs_elsewhere_keeps_its_record(
    tmp_path: Path, attempt: Callable[..., float | None]
) -> None:
    """Its worker may outlive the sweep; if it is killed later, the job has to resume."""

    def also_started() -> float:
        running = records.read_jobs(tmp_path)
        with alone_in(tmp_path / "0"), pytest.raises(InputError, match="is in use"):
            attempt(never, seed=1)
        assert records.read_jobs(tmp_path) == running
        return 0.25

    assert attempt(also_started, seed=1) == 0.25


def test_a_job_with_removed_results_is_repeated(
    tmp_path: Path, attempt: Callable[..., float | None]
) -> None:
    attempt(works(tmp_path), seed=1)
    (tmp_path / "0" / "manifest.json").unlink()
    assert attempt(works(tmp_path, 0.5), seed=1) == 0.5


@pytest.mark.parametrize("recorded", [True, False])
def test_another_configuration_is_refused_and_leaves_the_files_of_the_first(
    tmp_path: Path, attempt: Callable[..., float | None], recorded: bool
) -> None:
    """Whether or not the job that was there has a record."""
    attempt(works(tmp_path), seed=1)
    if not recorded:
        (tmp_path / ".jobs" / "0.json").unlink()
    before = records.read_jobs(tmp_path)
    with pytest.raises(InputError, match="another job .seed=1." if recorded else "unknown"):
        attempt(never, seed=2)
    assert records.read_jobs(tmp_path) == before
    if recorded:
        assert (tmp_path / "0" / ".hydra" / "overrides.yaml").read_text() == "seed=1"


def test_the_directory_of_a_job_without_results_can_be_reused(
    tmp_path: Path, attempt: Callable[..., float | None]
) -> None:
    with pytest.raises(ZeroDivisionError):
        attempt(lambda: 1 / 0, seed=1)
    assert attempt(works(tmp_path), seed=2) == 0.25
    assert [job.overrides for job in records.read_jobs(tmp_path)] == [("seed=2",)]


# --- all jobs in view ----------------------------------------------------------------------------


def planned(*overrides: str, target: str = "x.BasicSweeper") -> list[tuple[str, ...]]:
    sweeper = {"_target_": target, "params": {"model": "mlp,linear"}}
    hydra = {"sweeper": sweeper, "overrides": {"task": list(overrides)}}
    return [job.overrides for job in callback.planned(OmegaConf.create({"hydra": hydra}))]


def test_the_planned_jobs_are_those_of_the_grid_in_order() -> None:
    assert planned("eps=0.1", "seed=range(2)") == [
        ("model=mlp", "eps=0.1", "seed=0"), ("model=mlp", "eps=0.1", "seed=1"),
        ("model=linear", "eps=0.1", "seed=0"), ("model=linear", "eps=0.1", "seed=1"),
    ]  # fmt: skip
    assert planned("defense=glob(*)") == planned("seed=0,1", target="x.Optuna") == []
