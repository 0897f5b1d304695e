"""Measure training speed: samples per second of every defense, and ratios to two plain loops.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --network small_cnn --defense madry --rounds 5

Every figure comes from fresh processes that take turns in each round, so that a machine that slows
down affects all of them. A ratio is the speed of robusttrain divided by that of a plain loop in the
same round; the table has the median over the rounds. The plain loops, like `madry`, train with
PGD-10:

  textbook      `loss.backward()` in the inner loop, and a DataLoader that transforms single images
  torchattacks  the PGD of torchattacks, on batches of one tensor in memory
                (pip install '.[benchmark]')

Both use the same network with torch's own convolutions.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image, to_tensor

from robusttrain.config import build as configs
from robusttrain.config import schema
from robusttrain.config.folders import CONF
from robusttrain.config.run_config import Config
from robusttrain.data import Split, batches
from robusttrain.models import build_model
from robusttrain.models.first_conv import FirstConv2d
from robusttrain.report.terminal import Terminal
from robusttrain.runtime.malloc import keep_freed_memory
from robusttrain.threat import Threat
from robusttrain.training.engine import Batch
from robusttrain.training.recipe import Recipe, TrainingData
from robusttrain.training.trainer import Trainer

# Image shape, batch size, and number of warm-up batches, which are not counted.
NETWORKS = {"small_cnn": ((1, 28, 28), 128, 10), "preact_resnet18": ((3, 32, 32), 32, 1)}
DEFENSES = ("standard", "alpha_mix", "fgsm", "rt", "rt_perturbed", "lsa", "madry")
PLAIN = ("textbook", "torchattacks")
EPS, STEPS, STEP_SIZE = 8 / 255, 10, 2 / 255


def composed(network: str, defense: str) -> Config:
    """The default configuration of a network and a defense."""
    schema.register()
    batch_size = NETWORKS[network][1]
    overrides = [
        f"model={network}",
        f"defense={defense}",
        f"eps={EPS}",
        f"batch_size={batch_size}",
        "epochs=100000",
    ]
    if defense == "madry":
        overrides += [f"attack.steps={STEPS}", f"attack.step_size={STEP_SIZE}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return configs.build(configs.with_numbers(compose("config", overrides)))


def random_split(network: str) -> Split:
    """Images of noise, since their content does not affect the speed."""
    shape, batch_size, _ = NETWORKS[network]
    generator = torch.Generator().manual_seed(0)
    count = 16 * batch_size
    images = torch.randint(256, (count, *shape), generator=generator, dtype=torch.uint8)
    return Split(images, torch.randint(10, (count,), generator=generator))


def endless(split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches, epoch after epoch."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from batches(split, batch_size, generator)


def ours(network: str, defense: str) -> Iterator[None]:
    """Training steps of robusttrain."""
    built, split = composed(network, defense), random_split(network)
    model = build_model(built.model, 10, NETWORKS[network][0])
    recipe = Recipe(built.defense, built.optimizer, built.schedule, built.training)
    data = TrainingData(split, split, built.dataset)
    trainer = Trainer(model, recipe, data, Threat(built.norm, EPS), seed=0, terminal=Terminal())
    model.train()
    # As the command line does.
    keep_freed_memory()
    for x, y in endless(split, NETWORKS[network][1]):
        trainer.engine.train_batch_within_memory(built.defense, Batch(x, y), trainer.history)
        yield


class _OneByOne(Dataset[tuple[Tensor, int]]):
    """Single pictures that are transformed when they are read, as data sets usually are."""

    def __init__(self, split: Split) -> None:
        self.pictures = [to_pil_image(image) for image in split.images]
        self.labels = split.labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return to_tensor(self.pictures[index]), self.labels[index]


def textbook_pgd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """PGD as in tutorials, where the backward pass also computes gradients of the weights."""
    x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(STEPS):
        x_adv = x_adv.detach().requires_grad_()
        F.cross_entropy(model(x_adv), y).backward()
        x_adv = x_adv + STEP_SIZE * x_adv.grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    return x_adv.detach()


def plain_steps(network: str, loop: str) -> Iterator[None]:
    """Training steps of a plain loop."""
    shape, batch_size, _ = NETWORKS[network]
    split = random_split(network)
    model = build_model(composed(network, "madry").model, 10, shape)
    for module in model.modules():
        if isinstance(module, FirstConv2d):
            module.__class__ = nn.Conv2d
    optimizer = torch.optim.Adam(model.parameters())
    if loop == "textbook":
        loader = DataLoader(_OneByOne(split), batch_size, shuffle=True)
        source = (batch for _ in iter(int, 1) for batch in loader)

        def craft(x: Tensor, y: Tensor) -> Tensor:
            return textbook_pgd(model, x, y)
    else:
        import torchattacks

        source = endless(split, batch_size)
        craft = torchattacks.PGD(model, eps=EPS, alpha=STEP_SIZE, steps=STEPS)
    for x, y in source:
        x_adv = craft(x, y)
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        optimizer.step()
        yield


def measure(network: str, contender: str, seconds: float) -> float:
    """Samples per second in this process, over at least `seconds` and two batches."""
    _, batch_size, warmup = NETWORKS[network]
    torch.manual_seed(0)
    steps = plain_steps(network, contender) if contender in PLAIN else ours(network, contender)
    for _ in range(warmup):
        next(steps)
    done, started = 0, time.perf_counter()
    while done < 2 or time.perf_counter() - started < seconds:
        next(steps)
        done += 1
    return done * batch_size / (time.perf_counter() - started)


def measure_afresh(network: str, contender: str, seconds: float) -> float:
    """Samples per second in a fresh process."""
    command = [sys.executable, __file__, "--measure", contender, "--network", network]
    command += ["--seconds", str(seconds)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def compare(network: str, defenses: list[str], rounds: int, seconds: float) -> None:
    """Run all contenders in turn and print the table of one network."""
    contenders = [*PLAIN, *defenses]
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in contenders:
            rates[name].append(measure_afresh(network, name, seconds))
    table = Table(title=f"{network}, {rounds} rounds of {seconds:g} s", title_justify="left")
    table.add_column("training")
    for column in ("samples/s", *(f"ratio to {name}" for name in PLAIN)):
        table.add_column(column, justify="right")
    for name in contenders:
        ratios = [
            statistics.median(a / b for a, b in zip(rates[name], rates[plain], strict=True))
            for plain in PLAIN
        ]
        table.add_row(name, f"{statistics.median(rates[name]):.0f}", *(f"{r:.2f}" for r in ratios))
    Console().print(table)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", choices=NETWORKS, help="default: all")
    parser.add_argument("--defense", choices=DEFENSES, help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(measure(arguments.network, arguments.measure, arguments.seconds))
        return
    for network in [arguments.network] if arguments.network else NETWORKS:
        defenses = [arguments.defense] if arguments.defense else list(DEFENSES)
        compare(network, defenses, arguments.rounds, arguments.seconds)


if __name__ == "__main__":
    main()
