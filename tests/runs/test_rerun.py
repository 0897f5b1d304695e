"""`robusttrain rerun`: the same results, or a report of the differences."""

import json
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch

from robusttrain import renames
from robusttrain.checkpoints.checkpoint import Checkpoint
from robusttrain.errors import InputError
from robusttrain.runs.rerun import Repetition
from toys.command_line import CommandLine
from toys.runs import RUN, as_written, finished, refused


def test_a_run_is_repeated_from_its_manifest_alone(
    command_line: CommandLine, tmp_path: Path
) -> None:
    begin, first = partial(command_line.start, cwd=tmp_path), tmp_path / "first"
    finished(begin(*RUN, "epochs=1", f"hydra.run.dir={first}"))
    assert "the same results as first" in finished(begin("rerun", "first")).said

    report = pd.read_csv(first / "report.csv", dtype=str, keep_default_na=False)
    report.loc[0, "accuracy"] = "0.987"
    report.to_csv(first / "report.csv", index=False)
    said = refused(begin("rerun", "first"))
    assert "first holds results of several runs, or edited ones" in said
    as_written(first)
    (tmp_path / "first-rerun").rename(tmp_path / "elsewhere")
    other = refused(begin("rerun", "first"))
    assert "report.csv differs, first in accuracy of row 0: 0.987, now 0." in other
    assert "(values that differ: 1)" in other
    assert "rerun first has already been repeated" in refused(begin("rerun", "first"))


@pytest.fixture
def repetition(tmp_path: Path) -> Repetition:
    """A run and its repetition, with the same table, weights and circumstances."""
    circumstances = dict.fromkeys(
        ("data", "device_name", "threads", "python", "platform", "versions", "git"), "same"
    )
    for name in ("run", "run-rerun"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train.csv").write_text("epoch,seconds,loss\n1,2,0.5\n2,2,\n")
        Checkpoint({"w": torch.ones(3)}, 2, [1, 2, 2], {}, {}, 1, {}).save(folder / "best.pt")
        (folder / "manifest.json").write_text(json.dumps({"overrides": [], **circumstances}))
    manifest = {"overrides": ["eps=0.1"], **circumstances}
    return Repetition(tmp_path / "run", manifest, ("eps=0.1",))


def test_durations_are_no_difference(repetition: Repetition) -> None:
    (repetition.folder / "train.csv").write_text("epoch,seconds,loss\n1,9,0.5\n2,8,\n")
    assert repetition.differences() == []
    assert repetition.agreement() == f"the same results as {repetition.run}"
    assert repetition.command == ["eps=0.1", f'hydra.run.dir="{repetition.folder}"']


def test_differences_are_reported_with_possible_causes(repetition: Repetition) -> None:
    changed = json.loads((repetition.folder / "manifest.json").read_text()) | {"threads": 7}
    (repetition.folder / "manifest.json").write_text(json.dumps(changed))
    # Circumstances make no difference if the results are the same.
    assert repetition.differences() == []
    same = f"the same results as {repetition.run}"
    assert repetition.agreement() == f"{same}, although these changed: threads"
    (repetition.folder / "train.csv").write_text("epoch,seconds,loss\n1,2,0.5\n2,2,0.25\n")
    (repetition.folder / "report.csv").touch()
    other = Checkpoint({"w": torch.zeros(3)}, 2, [1, 2, 2], {}, {}, 1, {})
    other.save(repetition.folder / "best.pt")
    assert repetition.differences() == [
        "train.csv differs, first in loss of row 1: nan, now 0.25 (values that differ: 1)",
        "report.csv exists in only one of the two runs",
        "best.pt differs in w",
        "also changed: threads",
    ]


def test_a_table_of_another_shape_differs(repetition: Repetition) -> None:
    (repetition.folder / "train.csv").write_text("epoch,seconds,loss\n1,2,0.5\n")
    assert repetition.differences() == [
        "train.csv differs in shape: 2 x 2, now 1 x 2 (rows x columns)"
    ]


@pytest.mark.parametrize(("before", "today"), renames.CHECKS.items())
def test_a_check_that_had_another_name_is_the_same(
    repetition: Repetition, before: str, today: str
) -> None:
    for folder, name in ((repetition.run, before), (repetition.folder, today)):
        (folder / "audit.csv").write_text(f'check,figure\n"{name}",0\n')
    assert repetition.differences() == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "takes the directory of one run"),
        (["here", "there"], "takes the directory of one run"),
        (["nowhere"], "nowhere is not a finished run"),
    ],
)
def test_what_cannot_be_repeated_is_refused(arguments: list[str], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Repetition.of(arguments)
