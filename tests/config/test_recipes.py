"""Long recipes, run here with a small network and a few images."""

import io
from pathlib import Path

import hydra
import pandas as pd
import pytest
from rich.console import Console

from robusttrain.config import build as configs
from robusttrain.config import schema
from robusttrain.config.folders import CONF
from robusttrain.config.run_config import Config
from robusttrain.defenses.bounded import BoundDefense
from robusttrain.report.terminal import Terminal
from robusttrain.runs import experiment
from robusttrain.runs.context import Origin

SMALL = [
    "dataset=synthetic", "dataset.image_shape=[3,32,32]", "dataset.train_size=24",
    "dataset.test_size=4", "dataset.validation=8", "dataset.crop=4", "model.width=8",
    "epochs=2", "batch_size=8", "evaluation=quick", "evaluation.samples=4",
    "evaluation.audit=false", "logger=none", "device=cpu",
]  # fmt: skip


@pytest.mark.parametrize("recipe", ["cifar10_fast", "cifar10_trades_awp"])
def test_a_recipe_for_a_gpu_trains_and_evaluates_here(recipe: str, tmp_path: Path) -> None:
    config = built(f"experiment={recipe}", *SMALL)
    assert config.eps == pytest.approx(8 / 255)
    run(config, recipe, tmp_path)
    assert len(pd.read_csv(tmp_path / "train.csv")) == 2
    assert "worst_case" in set(pd.read_csv(tmp_path / "report.csv")["attack"])


# Two steps of training, and a network of two layers before the last one.
CERTIFIED = [
    "experiment=mnist_certified", "dataset=synthetic", "dataset.image_shape=[1,8,8]",
    "dataset.train_size=16", "dataset.test_size=4", "batch_size=16", "epochs=2",
    "model.channels=[4]", "model.strides=[2]", "model.hidden=[8]", "evaluation.audit=false",
    "device=cpu",
]  # fmt: skip


@pytest.mark.parametrize("defense", ["ibp", "mtl_ibp", "crown_ibp", "cc_ibp", "exp_ibp", "sabr"])
def test_the_certified_recipe_proves_images_with_each_defense_on_bounds(
    defense: str, tmp_path: Path
) -> None:
    config = built(*CERTIFIED, f"defense={defense}", "eps=0.3")
    assert isinstance(config.defense, BoundDefense)
    assert (config.defense.eps, config.defense.radius) == (0.3, pytest.approx(0.35))
    run(config, defense, tmp_path)
    assert len(pd.read_csv(tmp_path / "train.csv")) == 2
    assert "verified" in set(pd.read_csv(tmp_path / "report.csv")["attack"])


def built(*words: str) -> Config:
    schema.register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return configs.build(configs.with_numbers(hydra.compose("config", list(words))))


def run(config: Config, name: str, folder: Path) -> None:
    names = dict.fromkeys(("dataset", "model", "defense", "noise"), name)
    terminal = Terminal(Console(file=io.StringIO()))
    experiment.run(config, Origin({}, names), folder, terminal)
