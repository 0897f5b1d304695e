"""Runs on image folders: what was read is reported, and each figure has its file."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from robusttrain import load_model
from robusttrain.checkpoints import checkpoint as checkpoints
from robusttrain.checkpoints.checkpoint import Checkpoint
from toys.command_line import CommandLine
from toys.external import Answer
from toys.runs import finished, refused

RUN = [
    "dataset=folder", "dataset.path=photos", "dataset.image_size=6", "model=linear", "epochs=1",
    "batch_size=8", "evaluation=quick", "evaluation.audit=false", "device=cpu",
    "~evaluation.attacks.apgd_ce", "hydra.run.dir=run",
]  # fmt: skip
CLASSES = {"ant": 12, "bee": 10, "cat": 14}


def photos(place: Path) -> Path:
    """Classes of pictures of noise, some of them in nested folders, and other files."""
    generator = np.random.default_rng(0)
    for name, count in CLASSES.items():
        for number in range(count):
            inside = "more" if number % 3 == 0 else "."
            file = place / "photos" / name / inside / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(file)
    (place / "photos" / "ant" / "list.txt").write_text("0.png")
    return place / "photos"


@pytest.fixture(scope="module")
def run(command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run, beside its photos."""
    place = tmp_path_factory.mktemp("folder")
    photos(place)
    (place / "said").write_text(finished(command_line.start(*RUN, cwd=place)).said)
    return place / "run"


def test_a_line_says_what_was_read(run: Path) -> None:
    lines = (run.parent / "said").read_text().splitlines()
    assert (
        "dataset.path=photos has 3 classes (ant, bee, cat); 29 training and 7 test images "
        "(dataset.test_share=0.2 of each class); not read: 1 .txt"
    ) in lines


def test_the_manifest_has_counts_by_class_and_split(run: Path) -> None:
    entry = json.loads((run / "manifest.json").read_text())["dataset"]
    samples = pd.read_csv(run / "samples.csv")
    tested = samples["file"].str.partition("/")[0].value_counts().to_dict()
    assert entry["passed_over"] == {".txt": 1}
    assert entry["unreadable"] == []
    assert entry["classes"] == {
        name: {"train": count - tested[name], "test": tested[name]}
        for name, count in CLASSES.items()
    }


def test_each_sample_has_its_file(run: Path) -> None:
    """The model classifies the file as the row says."""
    samples = pd.read_csv(run / "samples.csv")
    assert list(samples)[:4] == ["index", "index_in", "file", "label"]
    model, names = load_model(run), list(CLASSES)
    for row in samples.to_dict("records"):
        assert names[row["label"]] == row["file"].partition("/")[0]
        pixels = np.asarray(Image.open(run.parent / "photos" / row["file"])).transpose(2, 0, 1)
        x = torch.from_numpy(pixels.copy())[None] / 255
        assert int(model(x).argmax()) == row["clean_prediction"]


def test_a_checkpoint_has_the_names_of_the_classes(run: Path) -> None:
    assert checkpoints.load(run).class_names == list(CLASSES)


def test_a_checkpoint_of_the_format_before_has_none(run: Path, tmp_path: Path) -> None:
    content = torch.load(run / "best.pt", weights_only=True)
    del content["class_names"]
    torch.save({**content, "format": "robusttrain checkpoint 1"}, tmp_path / "old.pt")
    saved = checkpoints.load(tmp_path / "old.pt")
    assert isinstance(saved, Checkpoint)
    assert saved.class_names == []


def test_all_bad_files_of_both_splits_are_listed_at_once(
    command_line: CommandLine, tmp_path: Path
) -> None:
    root = tmp_path / "photos"
    for part in ("train", "test"):
        photos(tmp_path / part).rename(tmp_path / f"{part}-photos")
        root.mkdir(exist_ok=True)
        (tmp_path / f"{part}-photos").rename(root / part)
    bad = [root / "train" / "ant" / "1.png", root / "train" / "cat" / "2.png"]
    bad.append(root / "test" / "bee" / "4.png")
    for path in bad:
        path.write_bytes(b"no image")
    said = refused(command_line.start(*RUN, cwd=tmp_path))
    assert len(said.splitlines()) == 1
    assert [str(path.relative_to(tmp_path)) in said for path in bad] == [True] * 3
    assert not (tmp_path / "run").exists()
    skipping = finished(command_line.start(*RUN, "dataset.skip_unreadable=true", cwd=tmp_path))
    assert "; 34 training and 35 test images; not read: 2 .txt; skipped as unreadable: 3 (" in (
        skipping.said
    )


def test_other_classes_than_those_of_the_training_are_named(run: Path, tmp_path: Path) -> None:
    folder = photos(tmp_path)
    (folder / "bee").rename(folder / "cow")
    words = [word for word in RUN if not word.startswith(("dataset.path", "hydra", "~", "epochs"))]
    again = ["stages=[evaluate]", f"checkpoint={run}", f"dataset.path={folder}"]
    said = Answer(tmp_path / "run", *words, *again).said
    assert "in another order: bee is now cat" in said
    same = Answer(tmp_path / "same", *words, *again[:2], f"dataset.path={run.parent / 'photos'}")
    assert "warning" not in same.said
