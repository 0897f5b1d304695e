"""Train the networks behind the models, in seconds, and keep them in a folder."""

import re
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from torch import Tensor, nn

from robusttrain import load_model
from robusttrain.data import Split, as_input
from robusttrain.data.digits import Digits

Change = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) to images."""


class Recipe(NamedTuple):
    """The training of a network in plain torch: Adam on the cross-entropy.

    `adversarial` maps network, images and labels of a batch to adversarial images.
    """

    epochs: int = 20
    rate: float = 2e-3
    batch: int = 64
    adversarial: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None


PLAIN = Recipe()

# The table has networks that are trained less than by default, unless they say more.
LENGTH = "epochs=20", "batch_size=128"


class Workshop:
    """Trains networks on the digits of scikit-learn, or loads them from `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def splits(self) -> tuple[Split, Split]:
        """The training and the test set."""
        return Digits().load()

    @cached_property
    def training(self) -> tuple[Tensor, Tensor]:
        """Images (N, 1, 8, 8) in [0, 1] and labels (N,) of the training set."""
        train, _ = self.splits
        return as_input(train.images), train.labels

    @cached_property
    def testing(self) -> tuple[Tensor, Tensor]:
        """Images and labels of the test set."""
        _, test = self.splits
        return as_input(test.images), test.labels

    def run(self, *words: str) -> nn.Module:
        """The network of a run of the command line with these arguments, in eval mode."""
        folder = self.folder_of(*words)
        with FileLock(folder.with_suffix(".lock")):
            if not (folder / "manifest.json").exists():
                own = "stages=[train]", "device=cpu", f"hydra.run.dir={folder}"
                command = [sys.executable, "-m", "robusttrain", *LENGTH, *words, *own]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return load_model(folder)

    def folder_of(self, *words: str) -> Path:
        """The directory of such a run."""
        return self.folder / re.sub(r"[^\w.]+", "_", " ".join(words))

    def fitted(self, name: str, make: Callable[[], nn.Module], recipe: Recipe = PLAIN) -> nn.Module:
        """The network `make` returns, trained in plain torch, in eval mode."""
        path = self.folder / f"{name}.pt"
        with FileLock(path.with_suffix(".lock")), torch.random.fork_rng():
            torch.manual_seed(0)
            network = make()
            if path.exists():
                network.load_state_dict(torch.load(path, weights_only=True))
            else:
                _fit(network, *self.training, recipe)
                torch.save(network.state_dict(), path)
        return network.eval()

    def plain(self) -> nn.Module:
        """A network that was trained without a defense, as it is in most planted models."""
        return self.run("defense=standard")

    def weak(self) -> nn.Module:
        """A network that is a little robust."""
        return self.run("defense=madry", "eps=0.03")


def _fit(network: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe) -> None:
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), recipe.rate)
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(images)).split(recipe.batch):
            x, y = images[rows], labels[rows]
            if recipe.adversarial:
                x = recipe.adversarial(network, x, y)
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()
