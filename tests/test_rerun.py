"""`robusttrain rerun`: the same results, or where they differ."""

import json
from pathlib import Path

import pytest
import torch
from test_resume import RUN, driven

from robusttrain.checkpoint import Checkpoint
from robusttrain.errors import InputError
from robusttrain.repetition import Repetition

TWICE = """
run = sys.argv[1:]
codes = [end(start([*run, "hydra.run.dir=first"])), end(start(["rerun", "first"]))]
report = Path("first", "report.csv")
lines = report.read_text().splitlines()
place = lines[0].split(",").index("accuracy")
words = lines[1].split(",")
words[place] = "0.987"
lines[1] = ",".join(words)
report.write_text("\\n".join(lines))
Path("first-rerun").rename("elsewhere")
codes.append(end(start(["rerun", "first"])))
codes.append(end(start(["rerun", "first"])))
print(json.dumps(codes))
"""


def test_a_run_is_repeated_from_its_manifest_alone(tmp_path: Path) -> None:
    codes = driven(tmp_path, TWICE, *RUN, "epochs=1")
    said = (tmp_path / "said.txt").read_text()
    assert codes == [0, 0, 1, 1], said
    assert "the same results as first" in said
    assert "report.csv differs in 1 values, first accuracy of row 0: 0.987, now 0." in said
    assert "rerun first was repeated before" in said


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
    return Repetition(tmp_path / "run", {"overrides": ["eps=0.1"], **circumstances})


def test_what_a_clock_says_is_no_difference(repetition: Repetition) -> None:
    (repetition.folder / "train.csv").write_text("epoch,seconds,loss\n1,9,0.5\n2,8,\n")
    assert repetition.differences() == []
    assert repetition.command == ["eps=0.1", f'hydra.run.dir="{repetition.folder}"']


def test_differences_are_named_with_what_may_explain_them(repetition: Repetition) -> None:
    changed = json.loads((repetition.folder / "manifest.json").read_text()) | {"threads": 7}
    (repetition.folder / "manifest.json").write_text(json.dumps(changed))
    # Circumstances that change nothing are not worth a word.
    assert repetition.differences() == []
    (repetition.folder / "train.csv").write_text("epoch,seconds,loss\n1,2,0.5\n2,2,0.25\n")
    (repetition.folder / "report.csv").touch()
    other = Checkpoint({"w": torch.zeros(3)}, 2, [1, 2, 2], {}, {}, 1, {})
    other.save(repetition.folder / "best.pt")
    assert repetition.differences() == [
        "train.csv differs in 1 values, first loss of row 1: nan, now 0.25",
        "report.csv is only in one of the two",
        "best.pt differs in w",
        "threads has changed, too",
    ]


def test_a_table_of_another_shape_differs(repetition: Repetition) -> None:
    (repetition.folder / "train.csv").write_text("epoch,seconds,loss\n1,2,0.5\n")
    assert repetition.differences() == ["train.csv differs: (2, 2) rows and columns, now (1, 2)"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "takes the directory of one run"),
        (["here", "there"], "takes the directory of one run"),
        (["nowhere"], "nowhere is no finished run"),
    ],
)
def test_what_cannot_be_repeated_is_refused(arguments: list[str], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Repetition.of(arguments)
