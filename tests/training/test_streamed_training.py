"""Training and evaluation on images that stay in files, against the same images in memory."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from robusttrain.attacks.pgd import PGD
from robusttrain.data import Samples, hold_out
from robusttrain.data import batching as batching_module
from robusttrain.data.folder import Folder
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.errors import InputError
from robusttrain.evaluation import Evaluation, evaluate, model_checks
from robusttrain.models import build_model
from robusttrain.models.mlp import MLP
from robusttrain.optim.optimizers import SGD
from robusttrain.optim.schedules import Constant
from robusttrain.report.terminal import Terminal
from robusttrain.runtime import free_memory
from robusttrain.threat import Norm, Threat
from robusttrain.training.precision import Precision
from robusttrain.training.recipe import Recipe, TrainingData
from robusttrain.training.settings import Training
from robusttrain.training.trainer import Trainer

EPS = 0.1
ATTACK = PGD(norm=Norm.linf, eps=EPS, steps=2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for label in range(3):
        (root / f"class{label}").mkdir()
        for number in range(30):
            pixels = generator.integers(60 * label, 60 * label + 120, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class{label}" / f"{number}.png")
    return root


def folder(root: Path, stream: bool, workers: int = 0) -> Folder:
    return Folder(str(root), stream=stream, workers=workers, crop=1, flip=True, validation=20)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(MLP([8]), 3, (3, 6, 6))


def quiet() -> Terminal:
    return Terminal(Console(file=io.StringIO()))


def trainer(data: Folder) -> Trainer:
    parts = hold_out(data.load()[0], data.validation, 0)
    train, validation = (part.to("cpu") for part in parts)
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 8, "precision": Precision.fp32}
    recipe = Recipe(
        WorstCase(ATTACK), SGD(0.1), Constant(), Training(**settings, validation_attack=ATTACK)
    )
    seen = TrainingData(train, validation, data)
    return Trainer(network(), recipe, seen, Threat(Norm.linf, EPS), seed=0, terminal=quiet())


def outcome(made: Trainer) -> tuple[Tensor, list[dict[str, Any]]]:
    """All weights, and the figures of the epochs except their seconds."""
    rows = [{k: v for k, v in e.row().items() if k != "seconds"} for e in made.epochs()]
    return torch.cat([value.flatten() for value in made.model.state_dict().values()]), rows


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_training_is_that_from_memory_bit_for_bit(workers: int, pictures: Path) -> None:
    weights, figures = outcome(trainer(folder(pictures, stream=False)))
    ours, told = outcome(trainer(folder(pictures, stream=True, workers=workers)))
    assert torch.equal(ours, weights)
    assert told == figures


def test_training_is_resumed_in_the_middle_of_an_epoch(pictures: Path) -> None:
    weights, _ = outcome(trainer(folder(pictures, stream=False)))
    stopped = trainer(folder(pictures, stream=True, workers=2))
    under_way = stopped.batches()
    for _ in range(3):
        next(under_way)
    under_way.close()
    again = trainer(folder(pictures, stream=True, workers=1))
    again.model.load_state_dict(stopped.model.state_dict())
    again.load_state_dict(stopped.state_dict())
    assert torch.equal(outcome(again)[0], weights)


def test_validation_in_portions_is_of_all_images(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(folder(pictures, stream=True))
    whole, _ = made.validate("validation", made.validation, ATTACK, 9)
    monkeypatch.setattr(batching_module, "PORTION", 9 * 3 * 6 * 6)
    # A random start differs by portion; the clean accuracy counts the same images.
    assert made.validate("validation", made.validation, ATTACK, 9)[0] == whole


def ledger(data: Samples, **settings: Any) -> Any:
    return evaluate(
        network(), data, Evaluation({"pgd": ATTACK}, **settings),
        threat=Threat(Norm.linf, EPS), seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("samples", [None, 7])
def test_evaluation_is_that_from_memory(samples: int | None, pictures: Path) -> None:
    ours, theirs = (
        ledger(folder(pictures, stream).load()[1].to("cpu"), samples=samples)
        for stream in (True, False)
    )
    assert ours.samples().equals(theirs.samples())
    assert ours.adversarial.keys() == theirs.adversarial.keys()
    for threat, images in ours.adversarial.items():
        assert np.array_equal(images, theirs.adversarial[threat])


def test_more_images_than_memory_takes_are_refused_before_any_work(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = folder(pictures, stream=True).load()[1]
    cpu = torch.device("cpu")
    monkeypatch.setattr(free_memory, "available", lambda: 7.0 * 16 * 3 * 6 * 6)
    model_checks.refuse_too_many(test, torch.arange(7), cpu)
    model_checks.refuse_too_many(test.loaded(), torch.arange(18), cpu)
    with pytest.raises(InputError, match=r"evaluation\.samples=8 .*smaller"):
        model_checks.refuse_too_many(test, torch.arange(8), cpu)
