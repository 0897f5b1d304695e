"""Strength of APGD, FAB and Square next to the code of their authors, in all three norms."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from robusttrain import load_model
from robusttrain.attacks.apgd import APGD
from robusttrain.attacks.ball_attack import BallAttack
from robusttrain.attacks.fab import FAB
from robusttrain.attacks.objectives import AttackObjective
from robusttrain.attacks.square import Square
from robusttrain.data import as_input
from robusttrain.data.digits import Digits
from robusttrain.models import build_model
from robusttrain.models.mlp import MLP
from robusttrain.threat import Norm
from toys.attacks import generator
from toys.command_line import CommandLine
from toys.runs import finished

pyautoattack = pytest.importorskip("pyautoattack")

IMAGES = 120
# On both sides: searches for three of nine classes, and half of the usual steps of FAB, which leave
# as many images standing.
TARGETS, FAB_STEPS = 3, 50
EPS = {Norm.linf: 0.1, Norm.l2: 0.6, Norm.l1: 2.5}
NAMES = {Norm.linf: "Linf", Norm.l2: "L2", Norm.l1: "L1"}


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A small network trained on digits with uniform noise, half way to robust."""
    train, _ = Digits().load()
    x, y = as_input(train.images), train.labels
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(MLP([64]), 10, (1, 8, 8))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
        for _ in range(200):
            rows = torch.randint(len(x), (128,))
            noisy = (x[rows] + 0.4 * (torch.rand(128, 1, 8, 8) - 0.5)).clamp(0, 1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(noisy), y[rows]).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def images(network: nn.Module) -> tuple[Tensor, Tensor]:
    """Test images that the network gets right."""
    _, test = Digits().load()
    x, y = as_input(test.images), test.labels
    right = (network(x).argmax(1) == y).nonzero().squeeze(1)[:IMAGES]
    return x[right], y[right]


def standing(network: nn.Module, x_adv: Tensor, y: Tensor) -> int:
    return int((network(x_adv).argmax(1) == y).sum())


CASES = {
    "apgd-ce": lambda norm, eps: APGD(norm=norm, eps=eps),
    "apgd-t": lambda norm, eps: APGD(
        norm=norm, eps=eps, objective=AttackObjective.dlr, targets=TARGETS
    ),
    "fab-t": lambda norm, eps: FAB(norm=norm, eps=eps, steps=FAB_STEPS, targets=TARGETS),
    "square": lambda norm, eps: Square(norm=norm, eps=eps, queries=500),
}


@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize("name", CASES)
def test_it_leaves_no_more_standing_than_the_reference(
    network: nn.Module, images: tuple[Tensor, Tensor], name: str, norm: Norm
) -> None:
    """Both draw at random: Square, the most random of them, may differ by 4 images, others by 2."""
    x, y = images
    reference = pyautoattack.AutoAttack(
        network, norm=NAMES[norm], eps=EPS[norm], version="standard", device="cpu", seed=0
    )
    reference.attacks_to_run = [name]
    reference.square.n_queries = 500
    reference.apgd_targeted.n_target_classes = reference.fab.n_target_classes = TARGETS
    reference.fab.n_iter = FAB_STEPS
    with torch.random.fork_rng():
        theirs, _ = reference.run_standard_evaluation(x, y, batch_size=IMAGES)
    attack: BallAttack = CASES[name](norm, EPS[norm])
    ours = attack(network, x, y, generator=generator())
    left = standing(network, theirs, y)
    assert 0 < left < IMAGES
    assert standing(network, ours, y) <= left + (4 if name == "square" else 2)


@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("queries", [50, 200])
def test_a_short_square_leaves_no_more_standing_than_a_short_one_of_the_reference(
    network: nn.Module, images: tuple[Tensor, Tensor], queries: int, rescaled: bool, norm: Norm
) -> None:
    """With the schedule of 10,000 queries as it is, as in AutoAttack, and rescaled to so few.

    They share no random numbers, so that luck may leave 5 of the 120 images more.
    """
    x, y = images
    reference = pyautoattack.square.SquareAttack(
        network, norm=NAMES[norm], eps=EPS[norm], n_queries=queries, resc_schedule=rescaled,
        seed=0, device="cpu",
    )  # fmt: skip
    with torch.random.fork_rng():
        theirs = reference.perturb(x, y)
    ours = Square(norm=norm, eps=EPS[norm], queries=queries)(network, x, y, generator=generator())
    assert standing(network, ours, y) <= standing(network, theirs, y) + 5


def test_a_trained_run_has_the_accuracy_that_the_reference_finds(
    command_line: CommandLine, tmp_path: Path
) -> None:
    """Within a point: on the same images, which are fewer than a hundred."""
    words = [
        "dataset=digits", "model=mlp", "model.widths=[16]", "epochs=2", "eps=0.05", "device=cpu",
        "evaluation=autoattack", "evaluation.samples=60", "evaluation.audit=false",
        "~evaluation.attacks.apgd_t", "~evaluation.attacks.fab_t", "~evaluation.attacks.square",
        "~evaluation.attacks.apgd_margin", "hydra.run.dir=run",
    ]  # fmt: skip
    finished(command_line.start(*words, cwd=tmp_path))
    report = pd.read_csv(tmp_path / "run" / "report.csv").set_index("attack")
    rows = pd.read_csv(tmp_path / "run" / "samples.csv")["index"].to_numpy()
    bunch = load_digits()
    x = torch.from_numpy((bunch.images[rows] * (255 / 16)).round() / 255).float().unsqueeze(1)
    y = torch.from_numpy(bunch.target[rows]).long()
    model = load_model(tmp_path / "run")
    reference = pyautoattack.AutoAttack(
        model, norm="Linf", eps=0.05, version="standard", device="cpu", seed=0
    )
    reference.attacks_to_run = ["apgd-ce"]
    with torch.random.fork_rng():
        x_adv, _ = reference.run_standard_evaluation(x, y, batch_size=100)
    theirs = standing(model, x_adv, y) / len(y)
    assert 0.1 < theirs < float(report["accuracy"]["clean"])
    assert float(report["accuracy"]["worst_case"]) == pytest.approx(theirs, abs=0.01)
