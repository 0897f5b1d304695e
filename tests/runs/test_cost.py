"""The cost of a run in its manifest."""

import csv
import json
from pathlib import Path

import pytest

from toys.command_line import CommandLine
from toys.runs import finished

WORDS = [
    "dataset=synthetic", "dataset.train_size=64", "dataset.test_size=30", "dataset.validation=16",
    "model=linear", "epochs=3", "batch_size=20", "device=cpu", "evaluation=quick",
    "evaluation.audit=false", "evaluation.samples=20",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cost")
    finished(command_line.start(*WORDS, "defense=standard", "hydra.run.dir=run", cwd=folder))
    return folder / "run"


def test_a_standard_training_passes_each_image_twice_an_epoch(run: Path) -> None:
    cost = json.loads((run / "manifest.json").read_text())["cost"]["training"]
    assert cost["passes"] == 3 * 48 * 2
    assert cost["images_per_second"] * cost["seconds"] == pytest.approx(3 * 48)
    assert cost["peak_memory_mib"] > 50


def test_an_evaluation_passes_what_its_attacks_report_and_the_clean_images(run: Path) -> None:
    cost = json.loads((run / "manifest.json").read_text())["cost"]["evaluation"]
    with (run / "report.csv").open() as file:
        rows = {row["attack"]: row for row in csv.DictReader(file)}
    per_image = float(rows["worst_case"]["forward"]) + float(rows["worst_case"]["backward"])
    reported = 20 * per_image
    # Beyond the table: the model is looked at before, and adversarial images are scored.
    assert reported <= cost["passes"] <= reported + 20 * 20
    assert cost["images_per_second"] * cost["seconds"] == pytest.approx(20)
