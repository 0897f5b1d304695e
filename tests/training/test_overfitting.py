"""Detection of training problems, on a training that overfits and on made-up rows."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from rich.console import Console
from torch import nn

from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.pgd import PGD
from robusttrain.checkpoints import checkpoint
from robusttrain.data import Split
from robusttrain.data.synthetic import Synthetic
from robusttrain.defenses import Defense
from robusttrain.defenses.alp import ALP, Pairing
from robusttrain.defenses.ibp import MTLIBP
from robusttrain.defenses.lsa import LSA
from robusttrain.defenses.standard import Standard
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.evaluation import Evaluation, evaluate
from robusttrain.models.mlp import MLP
from robusttrain.noise.gaussian import Gaussian
from robusttrain.optim.optimizers import Adam
from robusttrain.report.terminal import Terminal
from robusttrain.threat import Norm, Threat
from robusttrain.training.checkpointing import TrainingRun
from robusttrain.training.diagnostics import findings, findings_in_last, summary
from robusttrain.training.metrics import Epoch
from robusttrain.training.overfitting import (
    OverfittedError,
    TrainingHistory,
    probe_images,
    trains_on_ball,
)
from robusttrain.training.settings import OnOverfit
from robusttrain.training.trainer import Trainer
from toys.training import EPS, network, state_of, trainer

# Single-step training on this data resists its own attack, but loses to PGD within one epoch.
HARD = Synthetic([3, 16, 16], 10, train_size=600, noise=0.2, validation=0)
RADIUS = 0.16


def overfitting(**settings: Any) -> Trainer:
    torch.manual_seed(0)
    model = MLP([512, 512]).build(10, (3, 16, 16))
    made = trainer(
        WorstCase(FGSM(eps=RADIUS)), model=model, data=HARD, optimizer=Adam(2e-3),
        eps=RADIUS, **{"epochs": 4, "batch_size": 64, **settings},
    )  # fmt: skip
    made.terminal = Terminal(Console(file=io.StringIO(), width=300))
    return made


def finished(made: Trainer, folder: Path) -> tuple[TrainingRun, str]:
    about: dict[str, Any] = {"num_classes": 10, "image_shape": [3, 16, 16]}
    about |= {"config": {}, "names": {}}
    run = TrainingRun(made, folder, about, made.terminal, lambda epoch: None)
    run.finish()
    file = made.terminal.console.file
    assert isinstance(file, io.StringIO)
    return run, file.getvalue()


def accuracy(model: nn.Module, eps: float) -> float:
    """Accuracy on all training images under PGD-20, measured independently of the trainer."""
    split = HARD.load()[0]
    ledger = evaluate(
        model, split, Evaluation({"pgd": PGD(eps=eps, steps=20)}), threat=Threat(Norm.linf, eps),
        seed=7,
    )  # fmt: skip
    return 1 - float(ledger.union.mean())


def test_single_step_training_overfits_catastrophically_and_warns(tmp_path: Path) -> None:
    run, said = finished(overfitting(), tmp_path)
    assert [epoch.overfit for epoch in run.epochs] == [False, False, True, True]
    words = "warning: catastrophic overfitting in epoch 3: accuracy on training images under PGD-10"
    assert said.count("catastrophic") == said.count(words) == 1
    table = pd.read_csv(tmp_path / "train.csv")
    assert table["overfit"].tolist() == [False, False, True, True]
    pgd, fgsm = table["train_pgd_accuracy"], table["train_robust_accuracy"]
    # Meanwhile its accuracy under its own attack rises.
    assert pgd[2] < pgd[1] - 0.2
    assert fgsm[3] > fgsm[1]
    assert summary(run.epochs)["overfit_epochs"] == [3, 4]
    # There is no validation split to choose by.
    assert run.best is run.epochs[1]
    assert accuracy(run.trainer.model, RADIUS) > 0.4
    last = checkpoint.load(tmp_path / "checkpoint.pt")
    last.load_into(run.trainer.model, "last")
    assert accuracy(run.trainer.model, RADIUS) < 0.25


def test_training_can_stop_there(tmp_path: Path) -> None:
    made = overfitting(on_overfit="stop")
    run, _ = finished(made, tmp_path)
    assert [epoch.overfit for epoch in run.epochs] == [False, False, True]
    assert run.best is run.epochs[1]
    # A run that was killed after that has nothing left to train.
    again = overfitting(on_overfit="stop")
    again.load_state_dict(checkpoint.load(tmp_path / "checkpoint.pt").training)
    assert list(again.epochs()) == []


def test_a_rollback_to_half_the_learning_rate_prevents_overfitting(tmp_path: Path) -> None:
    run, said = finished(overfitting(on_overfit="rollback"), tmp_path)
    assert [epoch.rollbacks for epoch in run.epochs] == [0, 0, 1, 0]
    assert not any(epoch.overfit for epoch in run.epochs)
    assert [epoch.lr for epoch in run.epochs] == pytest.approx([2e-3, 2e-3, 1e-3, 1e-3])
    assert "restarting epoch 3 at half the learning rate: catastrophic overfitting" in said
    assert run.best is run.epochs[-1]
    assert accuracy(run.trainer.model, RADIUS) > 0.4


def test_training_stops_at_the_fourth_overfitting() -> None:
    history = TrainingHistory(best_pgd=0.9)
    for _ in range(3):
        with pytest.raises(OverfittedError):
            history.end_epoch(0.6, OnOverfit.rollback)
        history.roll_back()
    assert history.end_epoch(0.6, OnOverfit.rollback) == {"rollbacks": 3, "overfit": True}
    assert history.stopped
    assert history.lr_factor == 1 / 8


@pytest.mark.parametrize(
    ("accuracies", "falls"),
    [
        ([0.5, 0.31, 0.29, 0.1, 0.4], [False, False, True, True, False]),
        ([0.1, 0.9, 0.69, 0.95, 0.74], [False, False, True, False, True]),
        ([None, None], [False, False]),
        ([0.0, 0.15, 0.0], [False, False, False]),
    ],
)
def test_a_fall_is_measured_from_the_best_so_far(
    accuracies: list[float | None], falls: list[bool]
) -> None:
    history = TrainingHistory()
    assert [history.end_epoch(a, OnOverfit.warn)["overfit"] for a in accuracies] == falls
    assert not history.stopped


@pytest.mark.parametrize(
    ("own", "overfit"), [(None, False), (0.5, False), (0.59, False), (0.61, True), (1.0, True)]
)
def test_a_gap_between_the_training_attack_and_pgd_is_overfitting(
    own: float | None, overfit: bool
) -> None:
    history = TrainingHistory()
    assert history.end_epoch(0.1, OnOverfit.stop, own)["overfit"] == overfit == history.stopped


@pytest.mark.parametrize(
    ("norm", "eps", "overfit"), [("linf", 0.3, True), ("linf", 0.2, False), ("l2", 0.3, False)]
)
def test_overfitting_from_the_first_epoch_on_is_noticed_without_a_fall(
    norm: str, eps: float, overfit: bool, tmp_path: Path
) -> None:
    """The model never resisted PGD. Accuracies on different balls are not compared."""
    feeble = PGD(norm=Norm(norm), eps=eps, steps=1, step_size=1e-3, random_start=False)
    model = nn.Sequential(nn.Flatten(1), nn.Linear(3 * 16 * 16, 10))
    made = trainer(
        WorstCase(feeble), model=model, data=HARD, optimizer=Adam(1e-2), eps=0.3, epochs=2,
    )  # fmt: skip
    made.terminal = Terminal(Console(file=io.StringIO(), width=300))
    run, said = finished(made, tmp_path)
    assert [epoch.train_pgd_accuracy for epoch in run.epochs] == [0, 0]
    own = run.epochs[0].train_robust_accuracy
    assert own is not None
    assert own > 0.6
    assert [epoch.overfit for epoch in run.epochs] == [overfit, overfit]
    words = f"under PGD-10 is 0.0%, and {own:.1%} under the training attack"
    assert said.count(words) == overfit


@pytest.mark.parametrize(
    ("defense", "norm", "eps", "covered"),
    [
        (WorstCase(FGSM(eps=0.1)), Norm.linf, 0.1, True),
        (WorstCase(FGSM(eps=0.12)), Norm.linf, 0.1, True),
        (WorstCase(FGSM(eps=0.1)), Norm.linf, 0.12, False),
        # The l2 ball lies in the linf ball of the same radius.
        (WorstCase(FGSM(eps=0.1)), Norm.l2, 0.1, True),
        (WorstCase(FGSM(Norm.l2, 0.1)), Norm.linf, 0.1, False),
        (LSA(norm=Norm.l2, eps=0.1), Norm.l2, 0.1, True),
        (Standard(), Norm.linf, 0.1, False),
        # What counts is the attack, whatever the radius of the bounds is.
        (MTLIBP(PGD(eps=0.1), eps=0.3), Norm.linf, 0.3, False),
        (MTLIBP(PGD(eps=0.3), eps=0.3), Norm.linf, 0.3, True),
    ],
)
def test_balls_are_compared(defense: Defense, norm: Norm, eps: float, covered: bool) -> None:
    assert trains_on_ball(defense, Threat(norm, eps)) == covered


# The probe


@pytest.mark.parametrize(
    ("defense", "eps", "probed"),
    [
        (WorstCase(FGSM(eps=0.1)), 0.1, True),
        (LSA(eps=0.1), 0.1, True),
        (WorstCase(FGSM(eps=0.1)), 0.0, False),
        (ALP(FGSM(eps=0.1), pairing=Pairing.clean), 0.1, False),
        (Standard(), 0.1, False),
    ],
)
def test_only_adversarial_training_is_probed(defense: Defense, eps: float, probed: bool) -> None:
    for size, most in ((20, 20), (100, 32), (1000, 50), (50_000, 128)):
        split = Split(torch.zeros(size, 1, 1, 1), torch.zeros(size))
        assert probe_images(split, defense, eps).size == (most if probed else 0)


@pytest.mark.parametrize("predict", [False, True])
def test_the_probe_does_not_change_the_training(predict: bool) -> None:
    ends = []
    for size in (None, 0):
        model = network()
        model.append(nn.Dropout(0.2))
        Gaussian(0.2, predict=predict).install(model, 5)
        torch.manual_seed(3)
        made = trainer(WorstCase(PGD(eps=EPS, steps=2)), model=model)
        made.probe_images = Split(made.probe_images.images[:size], made.probe_images.labels[:size])
        epochs = list(made.epochs())
        assert all((epoch.train_pgd_accuracy is None) == (size == 0) for epoch in epochs)
        ends.append((state_of(model), torch.get_rng_state()))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_the_accuracy_is_that_of_pgd_10_on_the_first_images() -> None:
    """For a linear model the worst case in linf is known in closed form."""
    model = nn.Sequential(nn.Flatten(1), nn.Linear(16, 3))
    made = trainer(WorstCase(FGSM(eps=EPS)), model=model)
    (*_, epoch) = made.epochs()
    images, labels = (part[:32] for part in made.train)
    weight, x = model[1].weight.detach(), images.flatten(1) / 255
    lower, upper = (x - EPS).clamp_min(0) - x, (x + EPS).clamp_max(1) - x
    gap = weight[labels][:, None] - weight
    logits = x @ weight.T + model[1].bias.detach()
    lead = logits.gather(1, labels[:, None]) - logits
    worst = torch.where(gap > 0, lower[:, None], upper[:, None])
    least = (lead + (gap * worst).sum(2)).scatter(1, labels[:, None], 1)
    share = (least.amin(1) > 0).double().mean().item()
    assert 0.1 < share < 0.9
    assert epoch.train_pgd_accuracy == pytest.approx(share, abs=1e-9)


# Warnings


GOOD = Epoch(
    1, 0.0, 0.1, 0.5, train_clean_accuracy=0.9, train_robust_accuracy=0.8, val_clean_accuracy=None,
    val_robust_accuracy=None, non_finite=0, train_pgd_accuracy=0.8, rollbacks=0, overfit=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([{}, {}], ""),
        ([{}, {"non_finite": 3}], "3 steps of epoch 2 were skipped"),
        ([{}, {"overfit": True, "train_pgd_accuracy": 0.1}], "fell from 80.0% to 10.0%"),
        ([{"overfit": True}, {"overfit": True}], ""),
        (
            [{"train_pgd_accuracy": 0}, {"overfit": True, "train_pgd_accuracy": 0}],
            "in epoch 2: accuracy on training images under PGD-10 is 0.0%, and 80.0% under the",
        ),
        ([{}, {"train_robust_accuracy": 0.93}], "label leaking in epoch 2: 93.0%"),
        ([{}, {"train_robust_accuracy": 0.915}], ""),
        ([{"train_robust_accuracy": 0.93}, {"train_robust_accuracy": 0.95}], ""),
        ([{"train_robust_accuracy": 0.93, "train_clean_accuracy": None}, {}], ""),
    ],
)
def test_each_problem_gives_one_warning(changes: list[dict[str, Any]], words: str) -> None:
    epochs = [replace(GOOD, epoch=number, **change) for number, change in enumerate(changes, 1)]
    said = [finding.message for finding in findings_in_last(epochs, 10, 20)]
    assert len(said) == bool(words)
    assert words in "".join(said)


@pytest.mark.parametrize(("accuracy", "stuck"), [(0.119, True), (0.121, False), (None, False)])
def test_a_model_that_guesses_is_stuck(accuracy: float | None, stuck: bool) -> None:
    """The check comes halfway, when no warm-up can be the reason any more."""
    found = []
    for planned in range(1, 6):
        epochs = [
            replace(GOOD, epoch=n, train_clean_accuracy=None, train_robust_accuracy=accuracy)
            for n in range(1, planned + 1)
        ]
        found += [
            (planned, n)
            for n in range(1, planned + 1)
            if [*findings_in_last(epochs[:n], 10, planned)]
        ]
    assert found == ([(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)] if stuck else [])


def test_the_findings_of_a_training_are_those_of_its_epochs() -> None:
    changes: list[dict[str, Any]] = [
        {"train_clean_accuracy": 0.1, "train_robust_accuracy": 0.11},
        {"non_finite": 3, "overfit": True, "train_pgd_accuracy": 0.1},
        {"overfit": True},
        {"train_robust_accuracy": 0.97},
    ]
    epochs = [replace(GOOD, epoch=number, **change) for number, change in enumerate(changes, 1)]
    assert [(found.problem, found.epoch) for found in findings(epochs, 10, 2)] == [
        ("stuck", 1), ("skipped steps", 2), ("catastrophic overfitting", 2), ("label leaking", 4),
    ]  # fmt: skip
