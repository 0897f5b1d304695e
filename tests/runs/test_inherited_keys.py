"""Keys of components that come from a checkpoint are those of its options, not of the defaults."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from robusttrain.checkpoints import checkpoint
from robusttrain.models.mlp import MLP
from toys.command_line import Answer, CommandLine
from toys.external import SHAPE

EVALUATES = ["stages=[evaluate]", "evaluation=quick", "evaluation.audit=false", "device=cpu"]


@pytest.fixture(scope="module")
def place(command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a trained run, whose options are not the default ones, and its images."""
    place = tmp_path_factory.mktemp("place")
    for number in range(24):
        file = place / "photos" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * number).save(file)
    shutil.copytree(place / "photos", place / "moved")
    answer = command_line.run(
        "dataset=folder", "dataset.path=photos", "dataset.channels=1", "model=mlp",
        "model.widths=[4]", "noise=gaussian", "noise.sigma=0.1", "defense=trades", "optimizer=sgd",
        "epochs=1", "stages=[train]", "device=cpu", "hydra.run.dir=RUN", cwd=place,
    )  # fmt: skip
    assert answer.code == 0, answer.said
    return place


# Words of the command line, and values of the run that they make.
ALLOWED = {
    "dataset.path=moved": {"dataset.path": "moved", "dataset.channels": 1},
    "noise.sigma=0.5": {"noise.sigma": 0.5, "dataset.path": "photos"},
    "noise.sigma=4/255 noise.predict=true": {"noise.sigma": 4 / 255, "noise.predict": True},
    "dataset.test_share=0.5 eps=0.3": {"dataset.test_share": 0.5, "eps": 0.3},
    "dataset.path=moved dataset=folder dataset.channels=1": {"dataset.path": "moved"},
    "defense.beta=6 optimizer.momentum=0.9": {},
}


def run(command_line: CommandLine, place: Path, *words: str) -> Answer:
    return command_line.run("checkpoint=RUN", *words, cwd=place)


@pytest.mark.parametrize("words", ALLOWED)
def test_a_key_of_an_inherited_component_is_set(
    words: str, command_line: CommandLine, place: Path
) -> None:
    answer = run(command_line, place, *EVALUATES, *words.split())
    assert answer.code == 0, answer.said
    config = read_config(place / answer.run_dir)
    assert {key: config[key] for key in ALLOWED[words]} == ALLOWED[words]


def read_config(run: Path) -> dict[str, object]:
    import json

    from robusttrain.loggers import flattened

    return flattened(json.loads((run / "manifest.json").read_text())["configuration"])


REFUSED = {
    "dataset.pth=moved": (
        "dataset.pth=moved is not allowed: no such key, did you mean dataset.path?\n"
        "Keys of dataset: validation, crop, flip, extra, extra_labels, extra_share, path, "
        "image_size, channels, background, skip_unreadable, seed, test_share, "
        "stream, workers\n"
    ),
    "dataset.path.deeper=moved": "dataset.path.deeper=moved is not allowed: ",
    "dataset.image_shape=[1,8,8]": "dataset.image_shape=[1,8,8] is not allowed: no such key",
    "noise.sigma=-1": "noise.sigma=-1 is not allowed: it must be a finite number, 0 or more",
    "dataset.channels=three": (
        "dataset.channels=three is not allowed: Value 'three' of type 'str' could not be converted"
    ),
    "defense.weight=3": "defense.weight=3 is not allowed: no such key",
    "defense.beta=3": "defense.beta=3 differs from the training of the checkpoint",
    "model.width=3": "model.width=3 is not allowed: no such key, did you mean model.widths?",
}


@pytest.mark.parametrize("word", REFUSED)
def test_a_key_that_the_component_does_not_have_is_refused(
    word: str, command_line: CommandLine, place: Path
) -> None:
    answer = run(command_line, place, *EVALUATES, word)
    assert answer.code == 1
    assert answer.err.startswith(f"robusttrain: {REFUSED[word]}"), answer.said


def test_a_further_training_has_them_too(command_line: CommandLine, place: Path) -> None:
    words = ["stages=[train]", "epochs=1", "device=cpu"]
    keys = ["noise.sigma=0.5", "dataset.path=moved", "defense.beta=2"]
    answer = run(command_line, place, *words, *keys, "hydra.run.dir=further")
    assert answer.code == 0, answer.said
    config = checkpoint.load(place / "further").config
    assert (config["noise"]["sigma"], config["dataset"]["path"]) == (0.5, "moved")
    assert config["defense"]["beta"] == 2
    refused = run(command_line, place, *words, "optimizer.momentum=0.5")
    assert refused.err.startswith("robusttrain: optimizer.momentum=0.5 is not allowed: no such key")


def test_so_has_each_job_of_a_sweep(command_line: CommandLine, place: Path) -> None:
    words = [*EVALUATES, "noise.sigma=0.1,0.2", "hydra.sweep.dir=sweep"]
    answer = run(command_line, place, "-m", *words)
    assert answer.code == 0, answer.said
    assert [read_config(place / "sweep" / job)["noise.sigma"] for job in "01"] == [0.1, 0.2]


def test_a_model_from_elsewhere_has_the_options_of_the_command_line(
    command_line: CommandLine, tmp_path: Path
) -> None:
    torch.save(MLP([4]).build(10, SHAPE).state_dict(), tmp_path / "theirs.pt")
    given = [*EVALUATES, "checkpoint=theirs.pt", "model=mlp", "model.widths=[4]"]
    answer = command_line.run(*given, "dataset.path=moved", cwd=tmp_path)
    assert answer.err.startswith("robusttrain: dataset.path=moved is not allowed: no such key")
