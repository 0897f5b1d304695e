"""Training speed: samples a second of every defense, and ratios against two plain loops.

    python benchmarks/train_step.py                      # everything, about half an hour
    python benchmarks/train_step.py --network small_cnn --defense madry --rounds 5

Each figure comes from fresh processes that take turns, round after round, so that a machine which
slows down slows all of them. A ratio is the median over rounds of ours divided by theirs in the same
round. The plain loops train with PGD-10 and are

  textbook      `loss.backward()` in the inner loop, a DataLoader that transforms image by image
  torchattacks  the PGD of torchattacks on batches cut from a tensor in memory
                (pip install 'robusttrain[benchmark]')
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image, to_tensor

from robusttrain import config as configs
from robusttrain.cli import CONF
from robusttrain.data import Split
from robusttrain.models import build_model
from robusttrain.report.terminal import Terminal
from robusttrain.training import Trainer

NETWORKS = {"small_cnn": ((1, 28, 28), 128), "preact_resnet18": ((3, 32, 32), 32)}
DEFENSES = ("standard", "alpha_mix", "fgsm", "rt", "rt_perturbed", "lsa", "madry")
PLAIN = ("textbook", "torchattacks")
EPS, STEPS, STEP_SIZE, WARMUP_STEPS = 8 / 255, 10, 2 / 255, 2


def split(shape: tuple[int, int, int], count: int) -> Split:
    """Random images; what they show does not matter to speed."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, *shape), generator=generator, dtype=torch.uint8)
    return Split(images, torch.randint(10, (count,), generator=generator))


def ours(network: str, defense: str) -> Iterator[int]:
    """Steps of the default configuration; yields the samples of each."""
    shape, batch = NETWORKS[network]
    configs.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = [f"model={network}", f"defense={defense}", f"eps={EPS}", "epochs=1000000"]
        built = configs.build(compose("config", [*overrides, f"batch_size={batch}"]))
    torch.manual_seed(0)
    trainer = Trainer(
        build_model(built.model, 10, shape), built.defense, built.optimizer, built.schedule,
        built.training, train=split(shape, 64 * batch), validation=split(shape, 0),
        dataset=built.dataset, norm=built.norm, eps=EPS, seed=0, terminal=Terminal(),
    )  # fmt: skip
    samples = iter(())
    original, counted = trainer._descend, []

    def descend(loss: Tensor) -> None:
        original(loss)
        counted.append(batch)

    trainer._descend = descend  # type: ignore[method-assign]
    raise NotImplementedError(samples)
