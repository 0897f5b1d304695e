"""Models of others as files, and runs of the command line that take them, in this process."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import hydra
import pandas as pd
import torch
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor, nn

from robusttrain.api import task
from robusttrain.config import schema
from robusttrain.config.folders import CONF
from robusttrain.config.run_config import Config
from robusttrain.data import as_input
from robusttrain.data.synthetic import Synthetic
from robusttrain.report.terminal import Terminal
from robusttrain.runs import experiment
from robusttrain.runs.context import Origin

CLASSES, SHAPE = 5, (1, 8, 8)

# The options of a run that takes a moment.
TINY = [
    "dataset=synthetic", "dataset.train_size=96", "dataset.test_size=40", "device=cpu",
    "dataset.image_shape=[1,8,8]", f"dataset.num_classes={CLASSES}", "batch_size=32", "epochs=1",
    "evaluation=quick", "evaluation.eot=1", "evaluation.votes=1",
]  # fmt: skip


def images(count: int = 12) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(2))


def synthetic(train_size: int = 96) -> Synthetic:
    """The data of `TINY`, with more of it to train on where that is wanted."""
    return Synthetic(
        train_size=train_size, test_size=40, image_shape=list(SHAPE), num_classes=CLASSES
    )


def clean_accuracy(model: nn.Module) -> float:
    _, test = synthetic().load()
    return float((model(as_input(test.images)).argmax(1) == test.labels).float().mean())


# --- files -------------------------------------------------------------------------------------

Write = Callable[[nn.Module, Path], None]


def exported(model: nn.Module, path: Path, **batch: int) -> None:
    dynamic = ({0: torch.export.Dim("batch", **batch)},)
    torch.export.save(torch.export.export(model, (images(4),), dynamic_shapes=dynamic), path)


def scripted(model: nn.Module, path: Path) -> None:
    torch.jit.script(model).save(path)


def written(write: Write, model: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(model, path)
    return path


# --- runs --------------------------------------------------------------------------------------


def prepared(*overrides: str) -> tuple[Config, Origin]:
    """What the command line makes of these words, where it is not in Hydra's hands.

    Words without effect are not refused.
    """
    built, origin, _ = looked_at(*overrides)
    return built, origin


def looked_at(*overrides: str) -> task.Prepared:
    """`prepared`, with the refusals of the words that have no effect."""
    schema.register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("config", list(overrides), return_hydra_config=True)
    names = {key: str(value) for key, value in composed.hydra.runtime.choices.items()}
    OmegaConf.set_struct(composed, False)
    del composed["hydra"]
    return task.prepared(composed, names, list(overrides))


class Answer:
    """A run: what it said and what it left behind."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        folder.mkdir()
        built, self.origin = prepared(*overrides)
        said = io.StringIO()
        experiment.run(built, self.origin, folder, Terminal(Console(file=said, soft_wrap=True)))
        self.said = said.getvalue()
        if (folder / "report.csv").is_file():
            self.report = pd.read_csv(folder / "report.csv", keep_default_na=False)

    def accuracy(self, attack: str) -> float:
        """The accuracy in the row of an attack."""
        return float(self.report.set_index("attack")["accuracy"][attack])

    @property
    def labels(self) -> tuple[str, str]:
        """What the report calls model and defense."""
        return str(self.report["model"][0]), str(self.report["defense"][0])
