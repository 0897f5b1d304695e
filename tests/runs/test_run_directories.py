"""A directory holds the results of one run: others are refused, and readers notice a mixture."""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from robusttrain import load_model
from robusttrain.checkpoints import checkpoint
from robusttrain.errors import IdentityWarning, InputError
from robusttrain.report.compare import read_run
from robusttrain.report.identity import refuse_mixed
from robusttrain.run_directory import RESULTS
from robusttrain.runs.context import Origin
from robusttrain.runs.lock import alone_in
from robusttrain.runs.rerun import Repetition
from robusttrain.runs.run_directories import RunDirectories
from toys.command_line import CommandLine
from toys.runs import finished, listing, refused, rows, with_manifest

SMALL = [
    "dataset=synthetic", "dataset.train_size=64", "dataset.test_size=30",
    "dataset.validation=16", "model=linear", "epochs=1",
    "batch_size=32", "evaluation=quick", "evaluation.audit=false", "device=cpu",
    "~evaluation.attacks.apgd_ce", "evaluation.save_adversarial=true", "hydra.run.dir=run",
    "training.keep=last",
]  # fmt: skip
TRAIN, EVALUATE = "stages=[train]", "stages=[evaluate]"


def contents(folder: Path) -> dict[str, bytes]:
    paths = [folder / name for name in listing(folder)]
    return {str(path): path.read_bytes() for path in paths if path.is_file()}


@pytest.fixture(scope="module")
def place(command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `run` is a finished run."""
    place = tmp_path_factory.mktemp("directories")
    finished(command_line.start(*SMALL, cwd=place))
    return place


@pytest.fixture(scope="module")
def other(command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with another seed."""
    place = tmp_path_factory.mktemp("other")
    finished(command_line.start(*SMALL, "seed=1", cwd=place))
    return place / "run"


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Path:
    """A copy of that run, called `run` too."""
    return Path(shutil.copytree(place / "run", tmp_path / "run"))


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["seed=1", TRAIN], "seed, stages"),
        (["epochs=2"], "epochs"),
        (["defense=standard", "evaluation.samples=9"], "defense, evaluation"),
        ([EVALUATE, "checkpoint=run"], "checkpoint, stages"),
    ],
)
def test_results_of_another_configuration_are_kept_and_the_run_is_refused(
    command_line: CommandLine, place: Path, words: list[str], keys: str
) -> None:
    before = contents(place)
    said = refused(command_line.start(*SMALL, *words, cwd=place))
    assert len(said.splitlines()) == 1
    named = re.search(
        r"^robusttrain: hydra\.run\.dir=run holds results of another .*\((.*) diff", said
    )
    assert named is not None, said
    assert sorted(named[1].split(", ")) == sorted(keys.split(", "))
    assert contents(place) == before


def test_results_of_an_unknown_configuration_are_kept(command_line: CommandLine, run: Path) -> None:
    shutil.rmtree(run / ".hydra")
    before = contents(run)
    said = refused(command_line.start(*SMALL, cwd=run.parent))
    assert "hydra.run.dir=run holds results of an unknown configuration" in said
    assert contents(run) == before


def test_the_same_command_replaces_all_results(
    command_line: CommandLine, place: Path, run: Path
) -> None:
    for name in ("certified.csv", "audit.csv", "checkpoint.previous.pt"):
        (run / name).write_text("of another run")
    (run / "tensorboard").mkdir()
    (run / "mine.txt").write_text("of the user")
    finished(command_line.start(*SMALL, cwd=run.parent))
    assert listing(run) == sorted([*listing(place / "run"), "mine.txt"])
    for name in ("train.csv", "report.csv", "samples.csv"):
        assert rows(run / name) == rows(place / "run" / name)
    refuse_mixed(run, RESULTS)


NO_DATA = """
from robusttrain.data.synthetic import Synthetic
from robusttrain.errors import InputError

def load(self):
    raise InputError("dataset", "synthetic", problem="is not there today")

Synthetic.load = load
"""


def test_a_run_that_cannot_start_removes_no_results(command_line: CommandLine, run: Path) -> None:
    results = {name: (run / name).read_bytes() for name in ("manifest.json", "best.pt")}
    said = refused(command_line.start(*SMALL, cwd=run.parent, first=NO_DATA))
    assert "is not there today" in said
    assert {name: (run / name).read_bytes() for name in results} == results


def test_other_files_may_lie_in_the_directory(command_line: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("of the user")
    finished(command_line.start(*SMALL, TRAIN, "hydra.run.dir=.", cwd=tmp_path))
    assert {"notes.txt", "best.pt", "manifest.json"} <= set(listing(tmp_path))


# --- readers -------------------------------------------------------------------------------------


MIXED: dict[str, dict[str, object]] = {
    "the run only trained": {"files": ["train.csv", "best.pt", "checkpoint.pt"]},
    "the run kept no images": {"files": ["report.csv", "samples.csv", "train.csv", "best.pt"]},
    "an earlier version, which only trained": {
        "files": None, "configuration": {"stages": ["train"]},
    },
    "an earlier version, which only evaluated": {
        "files": None, "configuration": {"stages": ["evaluate"]},
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::robusttrain.errors.IdentityWarning")
@pytest.mark.parametrize("changes", MIXED.values(), ids=MIXED.keys())
def test_readers_refuse_files_of_several_runs(run: Path, changes: dict[str, object]) -> None:
    with_manifest(run, **changes)
    message = r"holds results of several runs, or edited ones: manifest\.json is not of "
    with pytest.raises(InputError, match=message):
        read_run(run)
    with pytest.raises(InputError, match=message):
        Repetition.of([str(run)])


def test_compare_refuses_them(command_line: CommandLine, place: Path, run: Path) -> None:
    with_manifest(run, **MIXED["the run only trained"])
    said = refused(command_line.start("compare", place / "run", run, cwd=run.parent))
    assert "holds results of several runs" in said
    assert "report.csv, samples.csv" in said


# What reads the files of a run, and which of them.
READERS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "compare": (read_run, ("report.csv", "samples.csv")),
    "rerun": (
        lambda run: Repetition.of([str(run)]),
        ("train.csv", "report.csv", "samples.csv", "best.pt"),
    ),
    "checkpoint=": (checkpoint.load, ("best.pt",)),
    "load_model": (load_model, ("best.pt",)),
}
READ = [(reader, file) for reader, (_, files) in READERS.items() for file in files]


def test_the_manifest_has_the_digests_of_all_results(place: Path) -> None:
    """Written last, it is of the files as they are."""
    run = place / "run"
    results = {
        "train.csv", "best.pt", "checkpoint.pt", "checkpoint.previous.pt", "report.csv",
        "samples.csv", "adversarial.npz", "gallery.npz", "result.json",
    }  # fmt: skip
    assert json.loads((run / "manifest.json").read_text())["files"] == {
        name: hashlib.sha256((run / name).read_bytes()).hexdigest()
        for name in results & set(listing(run))
    }


@pytest.mark.parametrize(("reader", "file"), READ)
def test_readers_refuse_a_file_of_another_run(
    run: Path, other: Path, reader: str, file: str
) -> None:
    read, _ = READERS[reader]
    read(run)
    shutil.copy(other / file, run / file)
    with pytest.raises(InputError, match=rf"manifest\.json is not of {re.escape(file)}; restore"):
        read(run)


def test_compare_refuses_an_evaluation_of_another_run(run: Path, other: Path) -> None:
    """Its tables agree with each other."""
    for file in ("report.csv", "samples.csv"):
        shutil.copy(other / file, run / file)
    with pytest.raises(InputError, match=r"is not of samples\.csv, report\.csv"):
        read_run(run)


@pytest.mark.parametrize("reader", READERS)
def test_readers_refuse_a_manifest_of_another_run(run: Path, other: Path, reader: str) -> None:
    read, files = READERS[reader]
    shutil.copy(other / "manifest.json", run)
    with pytest.raises(InputError, match=r"manifest\.json is not of ") as refusal:
        read(run)
    assert all(file in str(refusal.value) for file in files)


@pytest.mark.parametrize("reader", READERS)
def test_checkpoints_that_a_kill_has_left_are_not_foreign(run: Path, reader: str) -> None:
    """The manifest is written before they are removed."""
    listed = json.loads((run / "manifest.json").read_text())["files"]
    with_manifest(run, files={name: listed[name] for name in listed if name != "checkpoint.pt"})
    shutil.copy(run / "checkpoint.pt", run / "checkpoint.previous.pt")
    read, _ = READERS[reader]
    read(run)


def test_a_file_that_is_named_is_read_as_it_is(run: Path, other: Path) -> None:
    shutil.copy(other / "best.pt", run / "best.pt")
    with pytest.raises(InputError, match=r"name the file itself"):
        checkpoint.load(run)
    assert checkpoint.load(run / "best.pt").config["seed"] == 1


EARLIER: dict[str, dict[str, object]] = {
    "names without digests": {
        "files": ["train.csv", "best.pt", "checkpoint.pt", "checkpoint.previous.pt", "report.csv",
                  "samples.csv", "adversarial.npz", "gallery.npz", "result.json"],
    },
    "stages": {"files": None},
    "neither": {"files": None, "configuration": None},
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("changes", EARLIER.values(), ids=EARLIER.keys())
def test_readers_warn_about_runs_of_earlier_versions(
    run: Path, changes: dict[str, object], reader: str
) -> None:
    read, _ = READERS[reader]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(run)
    with_manifest(run, **changes)
    with pytest.warns(IdentityWarning, match=r"manifest\.json does not identify its files"):
        read(run)


def test_the_warning_is_one_line(command_line: CommandLine, place: Path, run: Path) -> None:
    with_manifest(run, files=None)
    answer = finished(command_line.start("compare", place / "run", run, cwd=run.parent))
    assert answer.err == (
        f"robusttrain: warning: {run} is of an earlier version, whose manifest.json does not "
        f"identify its files\n"
    )


def test_a_resumed_run_adopts_no_files_of_another(
    command_line: CommandLine, place: Path, other: Path, run: Path
) -> None:
    (run / "manifest.json").unlink()
    (run / "certified.csv").write_text("index,radius\n")
    for file in ("train.csv", "report.csv", "adversarial.npz"):
        shutil.copy(other / file, run / file)
    finished(command_line.start("resume=run", cwd=run.parent))
    assert listing(run) == listing(place / "run")
    for file in ("train.csv", "report.csv", "samples.csv"):
        assert rows(run / file) == rows(place / "run" / file), file
    refuse_mixed(run, RESULTS)


def test_a_damaged_manifest_is_named(run: Path) -> None:
    (run / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        read_run(run)


# --- nothing is written elsewhere ---------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [".hydra/config.yaml", ".hydra", "robusttrain.log", "report.csv", ".report.csv.7.partial",
     ".lock", "evaluation.partial", "evaluation.partial/clean", "tensorboard/events"],
)  # fmt: skip
@pytest.mark.parametrize("resumed", [True, False])
def test_links_out_of_the_directory_are_refused(tmp_path: Path, name: str, resumed: bool) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    (run / name).parent.mkdir(parents=True)
    (run / name).symlink_to(outside)
    config = OmegaConf.create({"hydra": {"run": {"dir": str(run)}}, "resume": resumed or None})
    with pytest.raises(SystemExit, match="contains a symbolic link"):
        RunDirectories().on_run_start(config)


def test_links_that_are_not_of_the_run_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(tmp_path)
    (tmp_path / "run").symlink_to(tmp_path)
    config = OmegaConf.create({"hydra": {"run": {"dir": str(tmp_path / "run")}}})
    RunDirectories().on_run_start(config)


@pytest.mark.parametrize("name", [".jobs", ".jobs/0.json", "0/report.csv", "0/.hydra/config.yaml"])
def test_links_out_of_a_sweep_are_refused(tmp_path: Path, name: str) -> None:
    sweep, outside = tmp_path / "sweep", tmp_path / "outside"
    (outside / "0").mkdir(parents=True)
    for place in [outside] if name == ".jobs" else [sweep / ".jobs", outside]:
        place.mkdir(parents=True, exist_ok=True)
        (place / "0.json").write_text("{}")
    (sweep / name).parent.mkdir(parents=True, exist_ok=True)
    (sweep / name).unlink(missing_ok=True)
    (sweep / name).symlink_to(outside)
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(sweep)}}})
    with pytest.raises(SystemExit, match="contains a symbolic link"):
        RunDirectories().on_multirun_start(config)


def test_the_name_of_the_job_moves_no_file(command_line: CommandLine, tmp_path: Path) -> None:
    words = [*SMALL, TRAIN, "hydra.job.name=../moved"]
    finished(command_line.start(*words, cwd=tmp_path))
    assert listing(tmp_path)[0] == "run"
    assert (tmp_path / "run" / "robusttrain.log").exists()


def test_secrets_of_the_environment_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "open-sesame")
    config = {"data_dir": "${oc.env:SECRET}", "dataset": {"path": "${data_dir}/images"}}
    assert Origin(config, {}).resolved() == {
        "data_dir": "${oc.env:SECRET}", "dataset": {"path": "${oc.env:SECRET}/images"},
    }  # fmt: skip
    # The run itself uses them.
    assert OmegaConf.create(config).dataset.path == "open-sesame/images"


@pytest.mark.parametrize("resumed", [True, False])
def test_a_second_command_leaves_the_run_in_progress_alone(tmp_path: Path, resumed: bool) -> None:
    """Hydra would replace its files there."""
    config = OmegaConf.create({"hydra": {"run": {"dir": str(tmp_path)}}, "resume": resumed or None})
    with alone_in(tmp_path), pytest.raises(SystemExit, match="is in use"):
        RunDirectories().on_run_start(config)
    RunDirectories().on_run_start(config)
