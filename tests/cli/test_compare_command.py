"""`robusttrain compare` as users see it: on the runs of a real sweep, and on bad input."""

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from robusttrain.cli import compare
from toys.command_line import PATIENCE, CommandLine
from toys.runs import as_written

SWEEP = [
    "-m", "dataset=synthetic", "dataset.train_size=96", "dataset.test_size=40",
    "dataset.validation=16", "model=linear", "epochs=4", "batch_size=32",
    "evaluation=quick", "evaluation.attacks.pgd.steps=3", "evaluation.audit=false",
    "defense=standard,fgsm", "optimizer.lr=0.01",
]  # fmt: skip


def robust(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "robusttrain", *arguments],
        cwd=cwd, env=os.environ | {"COLUMNS": "80"}, capture_output=True, text=True,
        timeout=PATIENCE, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sweep(command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a sweep over two defenses, below a folder of its own."""
    place = tmp_path_factory.mktemp("runs")
    done = command_line.run(*SWEEP, cwd=place)
    assert done.code == 0, done.said
    (folder,) = place.glob("outputs/sweeps/*/*")
    return folder


def edited(run: Path, new: Path, file: str, old: str = "", replacement: str = "") -> None:
    """Copy a run; in the copy, change `file` everywhere or remove it."""
    shutil.copytree(run, new)
    text = (new / file).read_text()
    (new / file).unlink()
    if old:
        changed = re.sub(old, replacement, text, flags=re.MULTILINE)
        assert changed != text
        (new / file).write_text(changed)


@pytest.fixture(scope="module")
def runs(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directories: `a` and `b` are whole, and each copy of `b` has one defect."""
    folder = tmp_path_factory.mktemp("compare")
    for name, run in (("a", sweep / "0"), ("b", sweep / "1")):
        shutil.copytree(run, folder / name)
    # No sample that b classifies correctly is left.
    edited(sweep / "1", folder / "poor", "samples.csv", r"^(\d+,test set,\d),\d,", r"\1,-1,")
    zero = pd.read_csv(folder / "poor" / "report.csv").assign(accuracy=0.0)
    zero.to_csv(folder / "poor" / "report.csv", index=False)
    edited(sweep / "1", folder / "unfinished", "samples.csv")
    edited(sweep / "1", folder / "half", "report.csv")
    for name, upper in (("small-radii", 0.125), ("large-radii", 0.25)):
        shutil.copytree(sweep / "1", folder / name)
        radii = pd.DataFrame({"index": range(8), "norm": "linf", "upper": upper, "largest": 0.4})
        radii.to_csv(folder / name / "radii.csv", index=False)
    edited(sweep / "1", folder / "broken", "samples.csv", r"^(\d+,test set),\d,", r"\1,x,")
    edited(
        sweep / "1", folder / "other-labels", "samples.csv", r"^7,test set,\d,", "7,test set,77,"
    )
    edited(sweep / "1", folder / "other-samples", "samples.csv", r"^(\d+),", r"1000\1,")
    edited(sweep / "1", folder / "other-eps", "report.csv", r",linf,0.1,", ",linf,0.2,")
    edited(sweep / "1", folder / "fewer-attacks", "samples.csv", "^(.*)fgsm_broken", r"\1fgsm_idle")
    long = ",wide_resnet_of_somebody,rt_perturbed_and_more,"
    edited(sweep / "1", folder / "long-names", "report.csv", ",linear,fgsm,", long)
    for edit in {path.parent for path in folder.glob("*/manifest.json")}:
        as_written(edit)
    (folder / "binary").mkdir()
    (folder / "binary" / "samples.csv").write_bytes(bytes(range(256)))
    return folder


# --- what it shows -----------------------------------------------------------------------------


def test_a_wildcard_takes_all_runs_of_a_sweep(sweep: Path) -> None:
    """And skips the files that Hydra writes next to them."""
    found = sorted(sweep.glob("*"))
    assert sweep / "multirun.yaml" in found
    done = robust("compare", *found, cwd=sweep)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    listed = set(re.findall(r"^run \d: (.*)$", done.stdout, re.MULTILINE))
    assert listed == {str(sweep / "0"), str(sweep / "1")}
    for word in ("synthetic", "linear", "standard", "fgsm", "linf, eps 0.1", "clean accuracy"):
        assert word in done.stdout


@pytest.fixture
def shown(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The output of the command, run in this process."""
    monkeypatch.chdir(runs)
    monkeypatch.setenv("COLUMNS", "80")

    def show(*arguments: str) -> str:
        compare.compare(arguments)
        return capsys.readouterr().out

    return show


def test_tables_fit_in_80_columns_and_lose_nothing(shown: Callable[..., str]) -> None:
    lines = shown("a", "long-names").splitlines()
    assert max(len(line) for line in lines) <= 80
    header = next(line for line in lines if "defense" in line)
    start, middle, end = (header.index(word) for word in ("model", "defense", "noise"))
    assert "wide_resnet_of_somebody" in "".join(line[start:middle].strip() for line in lines)
    assert "rt_perturbed_and_more" in "".join(line[middle:end].strip() for line in lines)


def test_the_rank_table_has_the_figures_of_the_reports(
    runs: Path, shown: Callable[..., str]
) -> None:
    text = shown("a", "b")
    accuracies = {}
    for name in ("a", "b"):
        with (runs / name / "report.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                if row["attack"] in ("clean", "worst_case"):
                    assert f"{float(row['accuracy']):.2%}" in text
                    interval = (100 * float(row[end]) for end in ("ci_low", "ci_high"))
                    assert "{:.2f}-{:.2f}".format(*interval) in text
                if row["attack"] == "worst_case":
                    accuracies[name] = float(row["accuracy"])
    better, worse = sorted(accuracies, key=lambda name: -accuracies[name])
    assert f"run 1: {better}\nrun 2: {worse}\n" in text


def test_a_winner_is_shown_and_written_where_there_is_one(
    runs: Path, shown: Callable[..., str]
) -> None:
    text = shown("poor", "--csv", "pairs.csv", "a")
    with (runs / "pairs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    (runs / "pairs.csv").unlink()
    assert [row["measure"] for row in rows] == ["clean", "worst_case"]
    right = round(40 * max(float(rows[0]["accuracy_a"]), float(rows[0]["accuracy_b"])))
    assert sorted([int(rows[0]["b"]), int(rows[0]["c"])]) == [0, right]
    # All discordant samples favour one run, and Holm corrects for both tests.
    assert float(rows[0]["p_holm"]) == pytest.approx(2 * 2 / 2**right, rel=1e-5)
    assert rows[0]["winner"] == "a"
    number = next(number for number in (1, 2) if f"run {number}: a\n" in text)
    lines = re.findall("^ 1 - 2 .*$", text, re.MULTILINE)
    assert lines[0].split()[-1] == str(number)

    even = shown("b", "fewer-attacks", "--clean")
    (line,) = re.findall("^ 1 - 2 .*$", even, re.MULTILINE)
    assert line.split()[-2:] == ["1.0000", "1.0000"]


def test_radii_are_shown_and_written_where_both_runs_have_them(
    runs: Path, shown: Callable[..., str], tmp_path: Path
) -> None:
    table, page = tmp_path / "radii.csv", tmp_path / "page.html"
    words = ["large-radii", "small-radii", "b"]
    text = shown(*words, "--radii-csv", str(table), "--html", str(page))
    # All of eight images agree: the p of the signed ranks is that of eight tosses of a coin.
    (line,) = re.findall("^ .* linf +8 .*$", text, re.MULTILINE)
    assert line.split()[4:] == ["0.25,", "0.125", "8,", "0", "0.0078"]
    assert "Wilcoxon" in text
    (row,) = pd.read_csv(table).to_dict("records")
    assert [row["run_a"], row["run_b"]] == ["large-radii", "small-radii"]
    assert [row["median_a"], row["median_b"]] == [0.25, 0.125]
    assert row["p"] == pytest.approx(2 / 2**8)
    said = page.read_text()
    assert "Radius of each image" in said
    assert "0.0078" in said


def test_radii_are_left_out_of_a_comparison_of_clean_accuracies(
    shown: Callable[..., str], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    words = ["large-radii", "small-radii", "--clean", "--html", str(page)]
    assert "Wilcoxon" not in shown(*words)
    assert "Radius" not in page.read_text()


def test_nothing_is_written_without_csv(runs: Path, shown: Callable[..., str]) -> None:
    before = sorted(runs.rglob("*"))
    shown("a", "b")
    assert sorted(runs.rglob("*")) == before


def test_clean_accuracies_are_compared_across_threat_models(shown: Callable[..., str]) -> None:
    text = shown("a", "other-eps", "--clean")
    assert "clean accuracy" in text
    assert "worst case" not in text


def test_a_comparison_of_weaker_and_stronger_evaluations_warns(
    shown: Callable[..., str],
) -> None:
    assert "warning: the runs faced different attacks" in shown("a", "fewer-attacks")
    assert "warning" not in shown("a", "fewer-attacks", "--clean")
    assert "warning" not in shown("a", "b")


def test_unions_alone_are_compared_image_by_image(
    command_line: CommandLine, tmp_path: Path
) -> None:
    """Runs whose worst cases are empty, as attacks passed over what was broken."""
    done = command_line.run(
        *SWEEP, "threats={linf: 0.05, l2: 0.5}", "evaluation.union_only=true",
        "hydra.sweep.dir=sweep", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.said
    summary = (tmp_path / "sweep/sweep.md").read_text()
    assert "\nWorst case in l2, eps 0.5 or linf, eps 0.05, on 40 images." in summary
    runs = [tmp_path / "sweep" / name for name in ("0", "1")]
    compare.compare([*map(str, runs), "--csv", str(tmp_path / "pairs.csv")])
    pairs = pd.read_csv(tmp_path / "pairs.csv").set_index("measure")
    assert list(pairs.index) == ["clean", "union"]
    samples = [pd.read_csv(run / "samples.csv").set_index("index") for run in runs]
    # The runs are ranked, so that the first one of a pair may be either.
    right = {str(run): each["broken_by"].isna() for run, each in zip(runs, samples, strict=True)}
    first, second = (right[pairs.loc["union", name]] for name in ("run_a", "run_b"))
    assert pairs.loc["union", "b"] == (first & ~second).sum()
    assert pairs.loc["union", "c"] == (second & ~first).sum()
    assert pairs.loc["union", "difference"] == pytest.approx(first.mean() - second.mean(), abs=1e-5)


def test_the_help_explains_the_arguments(tmp_path: Path) -> None:
    done = robust("compare", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    for word in ("RUN", "--clean", "--csv FILE", "--radii-csv FILE", "McNemar", "Holm", "0.05"):
        assert word in done.stdout


def test_it_starts_without_torch_and_hydra(runs: Path) -> None:
    code = (
        "import sys; sys.argv[1:] = ['compare', 'a', 'b']\n"
        "from robusttrain.__main__ import main; main()\n"
        "print({'torch', 'hydra'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=runs, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"


# --- what it refuses ---------------------------------------------------------------------------


# The arguments of `compare`, and words of the message.
REFUSALS: dict[str, list[str]] = {
    "": ["no runs cannot be compared", "two runs or more"],
    "a": ["a cannot be compared", "two runs or more"],
    "a b b/../a": ["a and b/../a", "same run"],
    "a b missing": ["missing", "samples.csv"],
    "a unfinished": ["unfinished", "samples.csv"],
    "a half": ["half", "report.csv"],
    "a a/report.csv": ["a/report.csv", "samples.csv"],
    "a broken": ["broken/samples.csv", "cannot be read"],
    "a binary": ["binary/samples.csv"],
    "a other-labels": ["a and other-labels", "same data", "sample 7"],
    "a other-samples": ["a and other-samples", "no test sample in common"],
    "a other-eps": ["a (linf, eps 0.1)", "other-eps (linf, eps 0.2)", "--clean"],
    "a b --csv": ["--csv"],
    "a b --csv none/pairs.csv": ["--csv none/pairs.csv", "cannot be written", "directory"],
    "a b --csv a": ["--csv a", "cannot be written"],
    "a b --radii-csv x.csv": ["--radii-csv x.csv would be empty", "evaluation=radii"],
    "large-radii small-radii --clean --radii-csv x.csv --csv y.csv": ["x.csv", "without --clean"],
    "large-radii small-radii --radii-csv none/x.csv": [
        "--radii-csv none/x.csv",
        "cannot be written",
    ],
    "a b --cvs=x": ["--cvs=x", "--help"],
}


@pytest.mark.parametrize("command", REFUSALS)
def test_bad_input_ends_with_one_line(
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    before = sorted(runs.rglob("*"))
    monkeypatch.chdir(runs)
    with pytest.raises(SystemExit) as leaving:
        compare.compare(command.split())
    message = str(leaving.value.code)
    assert message.startswith("robusttrain: ")
    assert len(message.splitlines()) == 1, message
    for name in REFUSALS[command]:
        assert name in message
    assert capsys.readouterr() == ("", "")
    assert sorted(runs.rglob("*")) == before


def test_a_run_without_a_manifest_is_a_warning(runs: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(runs / name, tmp_path / name)
    (tmp_path / "b" / "manifest.json").unlink()
    answer = robust("compare", "a", "b", cwd=tmp_path)
    assert answer.returncode == 0
    assert answer.stderr.count("\n") == 1
    assert "robusttrain: warning: b is not finished: it has no manifest.json" in answer.stderr


def test_bad_input_of_a_real_command_line(runs: Path) -> None:
    done = robust("compare", "a", "missing", cwd=runs)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("robusttrain: missing is not the directory of a finished")
    assert done.stderr.count("\n") == 1
