"""Recipes for a GPU, run here with a small network and a few images."""

import io
from pathlib import Path

import hydra
import pandas as pd
import pytest
from rich.console import Console

from robusttrain.config import build as configs
from robusttrain.config import schema
from robusttrain.config.folders import CONF
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
    schema.register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        node = configs.with_numbers(hydra.compose("config", [f"experiment={recipe}", *SMALL]))
    config = configs.build(node)
    assert config.eps == pytest.approx(8 / 255)
    names = dict.fromkeys(("dataset", "model", "defense", "noise"), recipe)
    terminal = Terminal(Console(file=io.StringIO()))
    experiment.run(config, Origin({}, names), tmp_path, terminal)
    assert len(pd.read_csv(tmp_path / "train.csv")) == 2
    assert "worst_case" in set(pd.read_csv(tmp_path / "report.csv")["attack"])
