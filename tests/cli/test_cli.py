"""The command line as users see it: the files of a run, and errors in the middle of one."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import robusttrain
from robusttrain.data import as_input
from robusttrain.data.synthetic import Synthetic
from robusttrain.run_directory import PREAMBLE
from robusttrain.runs.run_directories import remove_if_untouched
from toys.command_line import PATIENCE, Answer, CommandLine
from toys.runs import Answers, assert_refused, listing

pytestmark = pytest.mark.long

QUICK = [
    "evaluation=quick", "evaluation.attacks.pgd.steps=3", "evaluation.attacks.apgd_ce.steps=5",
]  # fmt: skip
TINY = [
    "dataset=synthetic", "dataset.train_size=96", "dataset.test_size=40", "dataset.validation=16",
    "model=linear", "epochs=2", "batch_size=32", *QUICK,
]  # fmt: skip
# The attacks of evaluation=quick and of evaluation=standard.
ATTACKS = ["uniform", "fgsm", "pgd", "apgd_ce"]
SUITE = ["apgd_ce", "apgd_t", "fab_t", "square", "apgd_margin"]


def robust(*arguments: str, cwd: Path, **variables: str) -> Answer:
    """Run the command line in a real process, with its output piped."""
    done = subprocess.run(
        [sys.executable, "-m", "robusttrain", *arguments],
        cwd=cwd, env=os.environ | variables, capture_output=True, text=True, timeout=PATIENCE,
        check=False,
    )  # fmt: skip
    return Answer(done.returncode, done.stdout, done.stderr, cwd)


def rows(path: Path, *, without: str = "") -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k != without} for row in csv.DictReader(file)]


def accuracies(run_dir: Path) -> dict[str, float]:
    return {row["attack"]: float(row["accuracy"]) for row in rows(run_dir / "report.csv")}


# --- the command lines ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package that defines a defense, and with an option for it."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "conf" / "defense").mkdir(parents=True)
    (folder / "conf" / "defense" / "mine.yaml").write_text("_target_: mypackage.Mine\n")
    (folder / "mypackage.py").write_text(
        "from dataclasses import dataclass\n"
        "from robusttrain.defenses import Defense, Objective\n\n\n"
        "@dataclass\nclass Mine(Defense):\n"
        "    def outer(self, model, x, x_adv, y, *, loss):\n"
        "        return Objective(loss(model(x), y).mean())\n"
    )
    return folder


DEFENSES = ["standard", "alpha_mix", "rt"]


@pytest.fixture(scope="module")
def others(
    command_line: CommandLine, package: Path, tmp_path_factory: pytest.TempPathFactory
) -> Answers:
    """Runs that do not depend on another run."""
    commands = {
        # The first command of the README with its own evaluation, both shortened.
        "first": [
            "defense=madry", "eps=0.03", "epochs=1", "model=mlp", "model.widths=[32]",
            "evaluation.attacks.square.queries=100", "evaluation.attacks.apgd_t.steps=20",
            "evaluation.attacks.fab_t.steps=20",
        ],
        # Options may be anywhere.
        "sweep": [
            *TINY, f"defense={','.join(DEFENSES)}", "-m", "eps=20/100,-1", "epochs=1",
            "evaluation.audit=false",
        ],
        "mine": [*TINY, "--config-dir", str(package / "conf"), "defense=mine"],
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("others")
    return command_line.each(commands, folder, PYTHONPATH=str(package))


@pytest.fixture(scope="module")
def finished(command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """A whole run, from a folder that is not the checkout."""
    answer = command_line.run(*TINY, cwd=tmp_path_factory.mktemp("alone"))
    assert answer.code == 0, answer.err
    return answer


@pytest.fixture(scope="module")
def driven(
    command_line: CommandLine,
    finished: Answer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Answers:
    """Runs that start from a finished run or are compared with it."""
    best, run = f"checkpoint={finished.run_dir / 'best.pt'}", f"checkpoint={finished.run_dir}"
    mild = [*TINY, "optimizer=sgd", "schedule=step", "schedule.milestones=[0.5]"]
    runs = {
        "again": TINY,
        "other seed": [*TINY, "stages=[train]", "seed=1"],
        "train": [*TINY, "stages=[train]"],
        "evaluate": ["stages=[evaluate]", best, *QUICK],
        "evaluate run": ["stages=[evaluate]", run, *QUICK],
        "keep": [
            "stages=[evaluate]", best, *QUICK, "evaluation.audit=false",
            "evaluation.save_adversarial=true",
        ],
        "transfer": [
            "stages=[evaluate]", best, "evaluation=quick",
            *(f"~evaluation.attacks.{name}" for name in ATTACKS),
            "+attack@evaluation.attacks.other=transfer",
            f"evaluation.attacks.other.source.run={finished.run_dir}",
        ],
        "zero": [*TINY, "eps=0", "epochs=1"],
        "smoke": ["experiment=smoke", "evaluation.strict=true"],
        "diverges": [*mild, "schedule.gamma=1e38"],
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("driven")
    answers = command_line.each(runs, folder)
    assert [answers[name].code for name in runs] == [0] * 9 + [1], answers.values()
    return answers


# --- a whole run -------------------------------------------------------------------------------


def test_a_run_leaves_its_files_and_no_others(finished: Answer) -> None:
    assert finished.run_dir.is_absolute()
    assert listing(finished.run_dir) == [
        ".hydra", ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml",
        "audit.csv", "best.pt", "command.json", "curve.csv", "gallery.npz", "manifest.json",
        "report.csv",
        "result.json", "robusttrain.log", "samples.csv", "train.csv",
    ]  # fmt: skip


def test_the_training_record_has_a_row_per_epoch(finished: Answer) -> None:
    epochs = rows(finished.run_dir / "train.csv")
    assert list(epochs[0]) == [
        "epoch", "seconds", "lr", "loss", "train_clean_accuracy", "train_robust_accuracy",
        "val_clean_accuracy", "val_robust_accuracy", "non_finite", "train_pgd_accuracy",
        "rollbacks", "overfit",
    ]  # fmt: skip
    assert [row["epoch"] for row in epochs] == ["1", "2"]


def test_the_report_has_a_row_per_attack(finished: Answer) -> None:
    report = rows(finished.run_dir / "report.csv")
    assert list(report[0]) == [
        "dataset", "model", "defense", "train_attack", "noise", "seed", "attack", "norm", "eps",
        "n", "accuracy", "ci_low", "ci_high", "forward", "backward", "seconds", "invalid", "audit",
    ]  # fmt: skip
    assert [row["attack"] for row in report] == [
        "clean",
        *ATTACKS,
        "probe",
        "control",
        "worst_case",
    ]
    described = ("dataset", "model", "defense", "train_attack", "noise", "seed", "n")
    first = [report[0][key] for key in described]
    assert first == ["synthetic", "linear", "madry", "pgd-10", "none", "0", "40"]
    assert [row["eps"] for row in report] == ["0", *["0.1"] * 5, "0", "0.1"]
    for row in report:
        assert float(row["ci_low"]) <= float(row["accuracy"]) <= float(row["ci_high"])


def test_attacked_images_are_kept_on_request(finished: Answer, driven: Answers) -> None:
    run_dir = driven["keep"].run_dir
    assert not {"audit.csv", "curve.csv", "evaluation.partial"} & set(listing(run_dir))
    kept = np.load(run_dir / "adversarial.npz")
    samples = rows(run_dir / "samples.csv")
    for key in ("index", "label", "broken_by"):
        assert kept[key].astype(str).tolist() == [row[key] for row in samples]
    _, test = Synthetic(train_size=96, test_size=40, validation=16).load()
    moved = torch.from_numpy(kept["images"])
    assert 0 < (moved - as_input(test.images)).abs().max() <= 0.1 + 1e-6
    right = robusttrain.load_model(finished.run_dir)(moved).argmax(1) == test.labels
    assert right.tolist() == [row["broken_by"] == "" for row in samples]
    report = rows(run_dir / "report.csv")
    assert [row["attack"] for row in report] == ["clean", *ATTACKS, "uint8", "worst_case"]


def test_a_saved_run_is_the_source_of_a_transfer_attack(finished: Answer, driven: Answers) -> None:
    """A transfer from the model to itself is as strong as an attack on it, without any query."""
    report = {row["attack"]: row for row in rows(driven["transfer"].run_dir / "report.csv")}
    assert list(report) == ["clean", "other", "probe", "control", "worst_case"]
    assert float(report["other"]["forward"]) == float(report["other"]["backward"]) == 0
    # Searches from other starts may differ by one of the 40 images.
    worst_case = accuracies(finished.run_dir)["worst_case"]
    assert float(report["other"]["accuracy"]) == pytest.approx(worst_case, abs=0.026)
    assert report["control"]["accuracy"] == report["clean"]["accuracy"] != "1"


def test_the_manifest_describes_the_run(finished: Answer) -> None:
    manifest = json.loads((finished.run_dir / "manifest.json").read_text())
    assert manifest["command"][1:] == TINY
    assert manifest["seconds"].keys() == {"train", "evaluate"}
    assert manifest["versions"]["torch"] == torch.__version__
    assert all(len(digest) == 64 for digest in manifest["data"].values())


def test_piped_output_is_plain_lines(finished: Answer) -> None:
    assert "\x1b" not in finished.out
    assert "\r" not in finished.out
    assert finished.err == ""
    for expected in ("epoch 1/2", "epoch 2/2", "worst_case", "95 % interval"):
        assert expected in finished.out


def test_the_saved_model_is_the_one_that_was_reported(finished: Answer) -> None:
    model = robusttrain.load_model(finished.run_dir)
    assert not model.training
    samples = rows(finished.run_dir / "samples.csv")
    _, test = Synthetic(train_size=96, test_size=40, validation=16).load()
    said = [int(row["clean_prediction"]) for row in samples]
    assert model(as_input(test.images)).argmax(1).tolist() == said


# --- repetition and stages ---------------------------------------------------------------------


def test_one_seed_gives_one_result(finished: Answer, driven: Answers) -> None:
    first, second = finished.run_dir, driven["again"].run_dir
    for name in ("train.csv", "report.csv", "audit.csv", "curve.csv"):
        assert rows(first / name, without="seconds") == rows(second / name, without="seconds")
    assert (first / "samples.csv").read_bytes() == (second / "samples.csv").read_bytes()
    weights = [torch.load(run / "best.pt")["model"] for run in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_another_seed_gives_another_result(finished: Answer, driven: Answers) -> None:
    runs = (finished.run_dir, driven["other seed"].run_dir)
    losses = [[row["loss"] for row in rows(run / "train.csv")] for run in runs]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", ["evaluate", "evaluate run"])
def test_evaluation_alone_repeats_the_report(finished: Answer, driven: Answers, name: str) -> None:
    again = driven[name].run_dir
    report = rows(finished.run_dir / "report.csv", without="seconds")
    assert rows(again / "report.csv", without="seconds") == report
    assert not {"train.csv", "best.pt", "checkpoint.pt"} & set(listing(again))


def test_training_alone_leaves_no_report(driven: Answers) -> None:
    left = set(listing(driven["train"].run_dir))
    assert {"train.csv", "best.pt", "manifest.json"} <= left
    assert not {"report.csv", "samples.csv"} & left


def test_at_eps_0_robust_is_clean(driven: Answers) -> None:
    run_dir = driven["zero"].run_dir
    assert len(set(accuracies(run_dir).values())) == 1
    assert {row["pgd_size"] for row in rows(run_dir / "samples.csv")} <= {"0", ""}


def test_the_smoke_experiment_passes_every_stage_without_a_doubt(driven: Answers) -> None:
    """It was strict, and has ended with code 0."""
    answer = driven["smoke"]
    left = listing(answer.run_dir)
    assert {"train.csv", "report.csv", "result.json"} <= set(left)
    assert "warning" not in answer.said
    assert "audit: pass, " in answer.out
    found = accuracies(answer.run_dir)
    # It learns something, and the attacks take something.
    assert found["clean"] > 0.7
    assert 0.2 < found["worst_case"] < found["clean"] - 0.05


def test_a_non_finite_loss_stops_the_run_and_keeps_earlier_epochs(
    driven: Answers,
) -> None:
    answer = driven["diverges"]
    assert answer.err.count("\n") == 1
    for named in ("the loss or its gradient became", "epoch 2", "batch 2", "learning rate 1e+37"):
        assert named in answer.err
    (run_dir,) = answer.cwd.glob("outputs/*/*")
    assert [row["epoch"] for row in rows(run_dir / "train.csv")] == ["1"]
    assert "the loss or its gradient became" in (run_dir / "robusttrain.log").read_text()
    for name in ("best.pt", "checkpoint.pt"):
        model = robusttrain.load_model(run_dir / name)
        assert all(bool(weights.isfinite().all()) for weights in model.parameters())


# --- names of earlier versions -------------------------------------------------------------------


def test_an_old_key_works_and_the_new_one_is_printed(
    command_line: CommandLine, tmp_path: Path
) -> None:
    answer = command_line.run("--cfg", "job", "training.curriculum.smooth=true", cwd=tmp_path)
    assert answer.code == 0, answer.err
    assert OmegaConf.create(answer.out).training.curriculum.per_batch is True
    assert answer.err == (
        "warning: training.curriculum.smooth=true is now spelt training.curriculum.per_batch=true\n"
    )


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("smooth: true", ["training.curriculum.smooth", "mean training.curriculum.per_batch?"]),
        ("eps_warmpu: 1", ["training.curriculum.eps_warmpu", "training.curriculum.eps_warmup"]),
        ("eps_warmup: [a]", ["training.curriculum.eps_warmup", "could not be converted to Float"]),
    ],
)
def test_a_recipe_with_a_wrong_line_is_refused_by_name(
    line: str, names: list[str], command_line: CommandLine, tmp_path: Path
) -> None:
    """An old key is one that is not there; the message has the new one."""
    recipe, cwd = tmp_path / "experiment" / "mine.yaml", tmp_path / "cwd"
    recipe.parent.mkdir()
    cwd.mkdir()
    recipe.write_text(f"# @package _global_\ntraining:\n  curriculum:\n    {line}\n")
    answer = command_line.run(f"--config-dir={tmp_path}", "experiment=mine", cwd=cwd)
    assert_refused(answer, ["In 'experiment/mine': ", *names])


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused_with_a_traceback_on_request(
    tmp_path: Path,
) -> None:
    """In a real process, since the variable is read during imports."""
    answer = robust("device=cuda", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert answer.code == 1
    assert "Traceback" in answer.err
    assert "device=cuda is not allowed: it must be auto, cpu" in answer.err
    assert listing(answer.cwd) == []


def test_bad_input_of_a_real_command_line(tmp_path: Path) -> None:
    answer = robust("model.wdth=3", cwd=tmp_path)
    assert_refused(answer, ["model.wdth=3", "model.width"])
    assert answer.out == ""


@pytest.mark.parametrize(
    ("run_dir", "kept", "removed"),
    [
        ("outputs/day/time", [], ["outputs"]),
        ("outputs/other/../day", ["outputs/other"], ["outputs/day"]),
        (".", [".hydra"], []),
        ("../elsewhere", [], ["../elsewhere"]),
    ],
)
def test_only_directories_of_a_refused_run_are_removed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_dir: str,
    kept: list[str],
    removed: list[str],
) -> None:
    here = tmp_path / "here"
    for path in [here, *(here / name for name in kept)]:
        path.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(here)
    (here / run_dir / ".hydra").mkdir(parents=True, exist_ok=True)
    (here / run_dir / "robusttrain.log").touch()
    remove_if_untouched((here / run_dir).resolve(), PREAMBLE)
    assert here.is_dir()
    assert all((here / name).exists() for name in kept)
    assert not any((here / name).exists() for name in removed)


def test_a_run_with_results_is_never_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / "best.pt").touch()
    remove_if_untouched(tmp_path / "run", PREAMBLE)
    assert listing(tmp_path / "run") == [".hydra", "best.pt"]


# --- the first command of the README -------------------------------------------------------------


@pytest.fixture(scope="module")
def first(others: Answers) -> Answer:
    answer = others["first"]
    assert answer.code == 0, answer.err
    return answer


@pytest.mark.parametrize(
    ("run", "names", "eps", "survivors_only"),
    [("finished", [*ATTACKS, "probe"], 0.1, False), ("first", [*SUITE, "probe"], 0.03, True)],
)
def test_the_report_is_counted_from_the_samples(
    run: str, names: list[str], eps: float, survivors_only: bool, request: pytest.FixtureRequest
) -> None:
    run_dir = request.getfixturevalue(run).run_dir
    samples = rows(run_dir / "samples.csv")
    assert list(samples[0]) == [
        "index", "index_in", "label", "clean_prediction", "clean_margin",
        *(f"{name}_{column}" for name in names for column in ("broken", "margin", "size")),
        "broken_by", "worst_prediction",
    ]  # fmt: skip
    wrong = np.array([row["clean_prediction"] != row["label"] for row in samples])
    first = np.where(wrong, "clean", "").astype(object)
    counted = {"clean": 1 - wrong.mean()}
    for name in names:
        spared = (first != "") if survivors_only and name != "probe" else wrong
        for column in ("broken", "margin", "size"):
            assert [row[f"{name}_{column}"] == "" for row in samples] == spared.tolist()
        broken = spared | [row[f"{name}_broken"] == "1" for row in samples]
        counted[name] = 1 - broken.mean()
        first[(first == "") & broken] = name
    assert [row["broken_by"] for row in samples] == first.tolist()
    counted["worst_case"] = (first == "").mean()
    said = {name: value for name, value in accuracies(run_dir).items() if name != "control"}
    assert said == pytest.approx(counted, abs=1e-6)
    sizes = [float(row[f"{name}_size"] or 0) for row in samples for name in names]
    assert 0 < max(sizes) <= eps + 1e-6


def test_the_first_command_ends_with_its_suite_and_an_audit(first: Answer) -> None:
    """Nothing here is random, so a radius of 0 leaves the clean accuracy exactly."""
    report = {row["attack"]: row for row in rows(first.run_dir / "report.csv")}
    assert list(report) == ["clean", *SUITE, "probe", "control", "worst_case"]
    assert {row["n"] for row in report.values()} == {"100"}
    clean = report["clean"]["accuracy"]
    assert report["control"]["accuracy"] == clean
    assert float(report["worst_case"]["accuracy"]) < float(clean)
    spent = [float(report[name]["forward"]) for name in ("clean", *SUITE)]
    assert float(report["worst_case"]["forward"]) == pytest.approx(sum(spent), rel=1e-5)

    curve = rows(first.run_dir / "curve.csv")
    radii = [row["eps"] for row in curve if row["curve"] == "eps"]
    assert radii == ["0", "0.0075", "0.015", "0.03", "0.045", "0.06", "0.12"]
    steps = [row["steps"] for row in curve if row["curve"] == "steps"]
    assert steps == ["1", "2", "5", "10", "20", "40", "80"]
    assert curve[0]["accuracy"] == clean

    checks = rows(first.run_dir / "audit.csv")
    verdicts = {row["verdict"] for row in checks}
    worst = next(verdict for verdict in ("fail", "warn", "pass") if verdict in verdicts)
    assert len(checks) >= 15
    doubts = [row["check"] for row in checks if row["verdict"] != "pass"]
    verdict, _, table = first.out.partition(" attack ")
    if doubts:
        panel = verdict.partition(f" audit: {worst} ")[2]
        assert len(re.findall(r" (warn|fail) +│$", panel, re.M)) == len(doubts)
        assert f"{len(checks) - len(doubts)} of {len(checks)} checks pass" in panel
    else:
        assert f"audit: pass, {len(checks)} checks\n" in verdict
    # The figure to quote is the last one; the paths of the page and of the run follow.
    assert table.splitlines()[-4].split()[0] == "worst_case"
    assert table.splitlines()[-1] == str(first.run_dir)


# --- sweeps ------------------------------------------------------------------------------------


def test_a_sweep_has_a_directory_per_job(others: Answers) -> None:
    """A job that fails does not stop the others."""
    answer = others["sweep"]
    assert answer.code == 1
    assert answer.err.splitlines()[-1].startswith("robusttrain: eps=-1 is not allowed")
    assert "Traceback" not in answer.err
    (folder,) = answer.cwd.glob("outputs/sweeps/*/*")
    jobs = {int(path.name): path for path in folder.glob("[0-9]*")}
    assert sorted(jobs) == [0, 2, 4]
    for number, path in jobs.items():
        last = rows(path / "report.csv")[-1]
        expected = (DEFENSES[number // 2], "0.2", "worst_case")
        assert (last["defense"], last["eps"], last["attack"]) == expected


# --- components of the user's own --------------------------------------------------------------


def test_a_defense_of_the_users_own_is_trained_saved_and_evaluated(
    command_line: CommandLine, others: Answers, package: Path, tmp_path: Path
) -> None:
    first = others["mine"]
    assert first.code == 0, first.err
    report = rows(first.run_dir / "report.csv", without="seconds")
    assert report[0]["defense"] == "mine"

    again = ["stages=[evaluate]", f"checkpoint={first.run_dir}", *QUICK, "trust=[mypackage]"]
    second = command_line.run(*again, cwd=tmp_path, PYTHONPATH=str(package))
    assert second.code == 0, second.err
    assert rows(second.run_dir / "report.csv", without="seconds") == report
