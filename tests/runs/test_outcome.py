"""Requirements of a run, its exit code, `result.json`, and how much it prints."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robusttrain.attacks.fgsm import FGSM
from robusttrain.errors import InputError
from robusttrain.evaluation.requirements import Baseline, requirements, rows_in
from robusttrain.evaluation.settings import Evaluation
from robusttrain.exit_codes import ExitCode
from robusttrain.report.compare import Measure, Run
from robusttrain.report.files import write_csv
from robusttrain.report.ledger import Row
from robusttrain.runs.outcome import Outcome, exit_code, strictly, unmet
from robusttrain.threat import Norm, Threat
from robusttrain.training.diagnostics import Finding
from toys.command_line import Answer, CommandLine
from toys.runs import SAYS_LOADED

LINF = Threat(Norm.linf, 8 / 255)
L2 = Threat(Norm.l2, 0.5)

SMALL = [
    "dataset=synthetic", "dataset.train_size=64", "dataset.test_size=30", "dataset.validation=16",
    "model=linear", "epochs=1", "batch_size=32", "evaluation=quick", "evaluation.audit=false",
    "device=cpu", "~evaluation.attacks.apgd_ce",
]  # fmt: skip


def report(folder: Path, right: dict[str, int], n: int, threat: Threat = LINF) -> Path:
    """A directory with the `report.csv` of attacks after which so many of `n` images are right."""
    rows = [
        Row.counted(name, None if name == "union" else threat, np.arange(n) >= count)
        for name, count in right.items()
    ]
    folder.mkdir(exist_ok=True)
    write_csv(folder / "report.csv", [row.as_dict() for row in rows])
    return folder


def baseline(folder: Path, threat: Threat = LINF, index: Sequence[int] = (0, 2, 5)) -> Baseline:
    clean = {"dataset": "digits"}
    label = pd.Series(0, index=index)
    measures = {"clean": None, "worst_case": threat}
    rows: dict[Measure, Any] = {Measure(name, each): clean for name, each in measures.items()}
    return Baseline(Run(folder, rows, (), label, {}), rows_in(folder), "digest")


# --- one by one ------------------------------------------------------------------------------


@given(n=st.integers(1, 20_000), share=st.floats(0, 1), below=st.integers(0, 30))
def test_the_same_accuracy_is_enough_and_a_lower_one_is_not(
    n: int, share: float, below: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Reports have six digits, which must decide nothing; here the counts do."""
    folder = tmp_path_factory.getbasetemp()
    before = round(share * n)
    now = max(0, before - below)
    then = baseline(report(folder / "before", {"clean": before}, n))
    rows = rows_in(report(folder / "now", {"clean": now}, n))
    (found,) = requirements(Evaluation(tolerance=0), rows, then)
    assert found.met == (now == before)


def test_every_worst_case_has_to_reach_what_is_required(tmp_path: Path) -> None:
    attacks = {"one": FGSM(eps=0.1), "two": FGSM(norm=Norm.l2, eps=0.5)}
    required = {"worst_case": 0.5, "union": 0.3, "one": 0.6, "clean": 0.9}
    settings = Evaluation(attacks, require=required)
    rows = [
        *rows_in(report(tmp_path, {"clean": 9, "one": 6, "worst_case": 5}, 10)),
        *rows_in(report(tmp_path, {"worst_case": 4, "union": 2}, 10, L2)),
    ]
    found = [*requirements(settings, rows, None)]
    assert [(one.figure, one.threat, one.met) for one in found] == [
        ("worst_case", "linf, eps 0.0313725", True), ("worst_case", "l2, eps 0.5", False),
        ("union", "", False), ("one", "linf, eps 0.0313725", True), ("clean", "", True),
    ]  # fmt: skip
    assert found[1].line == (
        "worst case (l2, eps 0.5) is 40.00%, but evaluation.require.worst_case requires 50.00% or "
        "more"
    )


def test_an_attack_is_known_by_its_name_however_it_was_fitted(tmp_path: Path) -> None:
    settings = Evaluation({"apgd_t": FGSM(eps=0.1)}, require={"apgd_t": 0.5})
    rows = rows_in(report(tmp_path, {"apgd_t targets=1": 6, "apgd_tt": 1}, 10))
    assert [one.met for one in requirements(settings, rows, None)] == [True]
    (missing,) = requirements(settings, rows[1:], None)
    assert not missing.met
    assert missing.line.startswith("apgd_t is no figure of this evaluation, but")


def test_only_what_both_runs_have_is_compared(tmp_path: Path) -> None:
    settings = Evaluation({"one": FGSM(eps=0.1), "two": FGSM(eps=0.1)})
    before = {"clean": 9, "one": 8, "old": 8, "worst_case": 7, "control": 9}
    then = baseline(report(tmp_path, before, 10))
    now = {"clean": 9, "one": 7, "two": 1, "worst_case": 7, "control": 1}
    found = requirements(settings, rows_in(report(tmp_path, now, 10)), then)
    assert [(one.figure, one.met) for one in found] == [
        ("clean", True), ("one", False), ("worst_case", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("dataset", "threat", "index", "digest", "words"),
    [
        ("digits", LINF, [0, 2, 5], "digest", ""),
        ("mnist", LINF, [0, 2, 5], "digest", "it has dataset=digits, and this run dataset=mnist"),
        ("digits", L2, [0, 2, 5], "digest", "linf, eps 0.0313725, and this run l2, eps 0.5"),
        ("digits", LINF, [0, 2, 5], "other", "another test set"),
        ("digits", LINF, [0, 2], "digest", "it has 3 images, and this run 2"),
        ("digits", LINF, [0, 2, 4], "digest", "other images"),
    ],
)
def test_a_baseline_is_of_the_same_data_and_threat(
    dataset: str, threat: Threat, index: list[int], digest: str, words: str, tmp_path: Path
) -> None:
    # As a file has it, in six digits.
    then = baseline(report(tmp_path, {"clean": 1}, 3), Threat(Norm.linf, 0.0313725))
    said = ""
    try:
        then.refuse_other_threats(dataset, [threat])
        then.refuse_other_images(digest, index, "test set")
    except InputError as error:
        said = str(error)
    assert words in said
    assert bool(said) == bool(words)


@pytest.mark.parametrize("verdict", ["pass", "warn", "none", "fail"])
@pytest.mark.parametrize("found", [None, [], [Finding("stuck", 3, "...")]], ids=str)
def test_a_strict_run_fails_with_its_audit_or_its_training(
    verdict: str, found: list[Finding] | None
) -> None:
    required = [*strictly([{"attack": "worst_case", "audit": verdict}], found)]
    assert [one.figure for one in required] == ["audit", "training"][: 1 + (found is not None)]
    assert [one.met for one in required] == [verdict != "fail", not found][: len(required)]
    lines = [one.line for one in required if not one.met]
    assert all("evaluation.strict" in line for line in lines)
    assert [*strictly([], None)] == []


def test_a_run_of_an_earlier_version_has_met_everything(tmp_path: Path) -> None:
    assert exit_code(tmp_path) is ExitCode.success
    assert unmet(tmp_path) == []


def test_a_run_without_evaluation_has_no_figures() -> None:
    content = Outcome([], [Finding("stuck", 1, "...")], []).content({}, 0, [])
    assert (content["clean"], content["worst_case"], content["audit"]) == (None, [], None)
    assert content["training"]["findings"][0]["problem"] == "stuck"
    assert Outcome([], None, []).content({}, 0, [])["training"] is None


# --- whole runs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, `base`."""
    folder = tmp_path_factory.mktemp("outcome")
    answer = command_line.run(*SMALL, "hydra.run.dir=base", cwd=folder)
    assert answer.code == 0, answer.said
    return folder


@pytest.fixture(scope="module")
def failed(command_line: CommandLine, place: Path) -> Answer:
    """A run that is worse than `base`, and than two of three required accuracies."""
    demands = ["evaluation.require.clean=0.999", "evaluation.require.fgsm=0"]
    return command_line.run(
        *SMALL, *demands, "evaluation.require.worst_case=0.999", "evaluation.baseline=base",
        "evaluation.tolerance=0", "evaluation.strict=true", "epochs=0", "hydra.run.dir=failed",
        cwd=place,
    )  # fmt: skip


def test_unmet_requirements_end_with_their_code_after_all_is_written(
    failed: Answer, place: Path
) -> None:
    assert failed.code == ExitCode.unmet
    assert failed.err == ""
    run = place / "failed"
    assert {"report.csv", "samples.csv", "manifest.json", "result.json", "best.pt"} <= {
        path.name for path in run.iterdir()
    }
    figures = pd.read_csv(run / "report.csv").set_index("attack")
    result = json.loads((run / "result.json").read_text())
    assert result["exit_code"] == 3
    for key in ("accuracy", "ci_low", "ci_high", "n"):
        assert result["clean"][key] == figures.loc["clean", key]
        assert result["worst_case"][0][key] == figures.loc["worst_case", key]
    assert result["audit"] == "none"
    given = {one["figure"]: one for one in result["requirements"] if "require" in one["key"]}
    assert {name: one["met"] for name, one in given.items()} == {
        "clean": False, "fgsm": True, "worst_case": False,
    }  # fmt: skip
    assert given["clean"]["value"] == figures.loc["clean", "accuracy"]
    assert given["clean"]["required"] == 0.999
    *lines, page, last = failed.out.splitlines()
    assert last == str(run)
    assert page.startswith(f"report: {run}")
    count = sum(not one["met"] for one in result["requirements"])
    assert all(" requires " in line for line in lines[-count:])
    assert not any(" requires " in line for line in lines[:-count])
    log = (run / "robusttrain.log").read_text()
    assert all(line in log for line in [*lines[-count:], page, last])
    # The result table, without what depends on the width of the terminal.
    assert [line.split("INFO")[1].split()[0] for line in log.splitlines() if "linf" in line][
        : len(figures)
    ] == figures.index.tolist()


def test_a_repetition_ends_with_the_code_of_its_run(
    failed: Answer, command_line: CommandLine, place: Path
) -> None:
    again = command_line.run("rerun", "failed", cwd=place)
    assert "the same results" in again.out
    assert again.code == ExitCode.unmet


@pytest.mark.parametrize("words", [["eps=0.2"], ["evaluation.samples=7"], ["dataset.seed=5"]])
def test_a_baseline_that_does_not_fit_is_refused_before_any_work(
    words: list[str], command_line: CommandLine, place: Path
) -> None:
    answer = command_line.run(
        *SMALL, *words, "evaluation.baseline=base", "hydra.run.dir=refused", cwd=place,
        first=SAYS_LOADED,
    )  # fmt: skip
    assert answer.code == ExitCode.failure
    start = "robusttrain: evaluation.baseline=base cannot be compared with this run: it has "
    assert answer.err.startswith(start)
    assert len(answer.err.splitlines()) == 1
    assert "epoch" not in answer.out
    assert not (place / "refused").exists()


def test_a_quiet_run_prints_warnings_and_its_directory(
    command_line: CommandLine, tmp_path: Path
) -> None:
    answer = command_line.run(*SMALL, "verbosity=quiet", cwd=tmp_path)
    *warnings, last = answer.out.splitlines()
    assert Path(last).is_dir()
    assert all(line.startswith("warning: ") for line in warnings)
    log = (Path(last) / "robusttrain.log").read_text()
    assert "epoch 1/1" in log
    assert " worst_case linf 0.1" in log


def test_a_verbose_run_prints_details_and_is_the_same_run(
    command_line: CommandLine, place: Path
) -> None:
    """Another verbosity is no other configuration, for which the directory would be refused."""
    before = pd.read_csv(place / "base" / "report.csv")["accuracy"].tolist()
    answer = command_line.run(*SMALL, "verbosity=verbose", "hydra.run.dir=base", cwd=place)
    assert answer.code == 0, answer.said
    assert "test set: 30 images of 1 x 8 x 8" in answer.out
    assert "DEBUG fgsm: " in (place / "base" / "robusttrain.log").read_text()
    assert pd.read_csv(place / "base" / "report.csv")["accuracy"].tolist() == before


def test_a_sweep_runs_all_jobs_and_ends_with_the_code_of_the_worst(
    command_line: CommandLine, tmp_path: Path
) -> None:
    words = [*SMALL, "-m", "epochs=0,1", "evaluation.require.clean=0.4", "hydra.sweep.dir=sweep"]
    answer = command_line.run(*words, cwd=tmp_path)
    table = pd.read_csv(tmp_path / "sweep" / "sweep.csv").query("attack == 'clean'")
    assert table["status"].tolist() == ["finished"] * 2
    short = [int(row["job"]) for row in table.to_dict("records") if row["accuracy"] < 0.4]
    assert short[0] == 0
    assert answer.code == ExitCode.unmet
    for number in short:
        assert f"job {number}: clean is " in answer.out
    again = command_line.run(*words, "verbosity=quiet", cwd=tmp_path)
    assert again.code == ExitCode.unmet
    *lines, last = again.out.splitlines()
    assert last == str(tmp_path / "sweep" / "sweep.md")
    assert [line.partition(":")[0] for line in lines] == [f"job {number}" for number in short]
