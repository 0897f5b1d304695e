"""Files are written whole or not at all."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from robusttrain.report.files import whole, write_arrays, write_csv, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.csv"
    path.write_text("old")

    def fail() -> None:
        with whole(path) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["report.csv"]


def test_a_failure_before_the_first_byte_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with whole(tmp_path / "report.csv"):
            raise RuntimeError("no disk")

    with pytest.raises(RuntimeError, match="no disk"):
        fail()
    assert names(tmp_path) == []


def test_a_reader_sees_the_old_content_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.csv"
    path.write_text("old")
    with whole(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        # In the same folder: a rename across file systems would be a copy.
        assert temporary.parent == path.parent
    assert path.read_text() == "new"
    assert names(tmp_path) == ["report.csv"]


class _Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("cannot be written")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_csv(path, [{"a": _Unprintable()}]),
        lambda path: write_json(path, {"a": _Unprintable()}),
    ],
    ids=["csv", "json"],
)
def test_writers_are_all_or_nothing(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="cannot be written"):
        write(path)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_tables_come_back(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    rows = [{"epoch": 1, "loss": 1 / 3, "val": None}, {"epoch": 2, "loss": 2e-7, "val": 0.5}]
    write_csv(path, rows)
    table = pd.read_csv(path)
    assert list(table["epoch"]) == [1, 2]
    assert list(table["loss"]) == pytest.approx([1 / 3, 2e-7], rel=1e-5)
    assert table["val"].isna().tolist() == [True, False]
    assert path.read_bytes().endswith(b"\n")


def test_json_takes_paths_and_whatever_has_a_name(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    write_json(path, {"a": [1, 2.5, None], "where": Path("x/y")})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None], "where": "x/y"}


@pytest.mark.parametrize("begin", ["=", "+", "-", "@", "\t"])
def test_no_cell_is_a_formula(tmp_path: Path, begin: str) -> None:
    """Spreadsheets compute cells that begin like this (OWASP, "CSV injection")."""
    rows = [{"name": f"{begin}cmd|x", "value": -0.5, "text": "-0.5", "count": 3, "ok": True}]
    write_csv(tmp_path / "table.csv", rows)
    with (tmp_path / "table.csv").open(newline="") as file:
        (cells,) = csv.DictReader(file)
    assert cells == {
        "name": f"'{begin}cmd|x", "value": "-0.5", "text": "-0.5", "count": "3", "ok": "True",
    }  # fmt: skip


def test_arrays_of_any_name_are_read_back(tmp_path: Path) -> None:
    arrays = {"file": np.array(["a", "b"]), "images": np.arange(6.0).reshape(2, 3), "eps": 0.5}
    write_arrays(tmp_path / "x.npz", arrays)
    with np.load(tmp_path / "x.npz") as read:
        assert {name: read[name].tolist() for name in read} == {
            name: np.asarray(array).tolist() for name, array in arrays.items()
        }
