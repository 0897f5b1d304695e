"""Distillation against its formula in float64, and the loading of its teacher."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.pgd import PGD
from robusttrain.checkpoints import checkpoint
from robusttrain.checkpoints.checkpoint import Checkpoint
from robusttrain.config.run_config import Config, Stage
from robusttrain.data.synthetic import Synthetic
from robusttrain.defenses.distill import Distill
from robusttrain.errors import InputError
from robusttrain.evaluation import Evaluation
from robusttrain.loggers.none import NoLogger
from robusttrain.models.mlp import MLP
from robusttrain.noise.gaussian import Gaussian
from robusttrain.noise.none import NoNoise
from robusttrain.optim.averaging import NoAveraging
from robusttrain.optim.optimizers import SGD
from robusttrain.optim.schedules import Constant
from robusttrain.optim.weight_perturbation import NoPerturbation
from robusttrain.report.terminal import Terminal
from robusttrain.runs import experiment
from robusttrain.runs.context import Origin
from robusttrain.training.settings import Training
from toys.defenses import (
    SHAPE,
    Fixed,
    asked,
    batch,
    generator,
    gradients_are_right,
    logits,
    network,
    objective_of,
    softmax,
)

NEARBY, _ = batch(seed=5)
TEACHER = 7


@pytest.mark.parametrize("alpha", [0.0, 5 / 6, 1.0])
def test_the_loss_is_the_formula(alpha: float) -> None:
    x, _ = batch()
    t, clean, adversarial = map(softmax, (logits(x, TEACHER), logits(x), logits(NEARBY)))
    robust, natural = ((t * np.log(t / q)).sum(1).mean() for q in (adversarial, clean))
    objective = objective_of(Distill(Fixed(NEARBY), network(TEACHER), alpha))
    expected = alpha * robust + (1 - alpha) * natural
    assert objective.loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_teacher_sees_a_batch_once() -> None:
    teacher = network(TEACHER)
    seen: list[torch.Tensor] = []
    teacher.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    objective_of(Distill(PGD(steps=3), teacher))
    (images,) = seen
    assert torch.equal(images, batch()[0])


def test_the_gradient_is_that_of_the_formula() -> None:
    assert gradients_are_right(Distill(Fixed(NEARBY), network(TEACHER)))


def test_the_attack_climbs_the_divergence_from_the_teacher() -> None:
    attack = Fixed(NEARBY)
    objective_of(Distill(attack, network(TEACHER)))
    t, q = softmax(logits(batch()[0], TEACHER)), softmax(logits(NEARBY))
    found = attack.loss(torch.from_numpy(logits(NEARBY)), batch()[1])
    np.testing.assert_allclose(found, (t * np.log(t / q)).sum(1), rtol=1e-12)


def test_the_teacher_stays_as_it_is_and_predicts_in_eval_mode() -> None:
    teacher = network(TEACHER)
    teacher.append(nn.BatchNorm1d(4).double()).append(nn.Dropout(0.5))
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    defense = Distill(PGD(steps=2), teacher)
    first, again = (objective_of(defense).loss for _ in range(2))
    assert torch.equal(first, again)
    first.backward()  # type: ignore[no-untyped-call]
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert teacher[4].training


def test_the_noise_of_a_teacher_is_drawn_by_the_generator_of_the_training() -> None:
    teacher = network(TEACHER)
    Gaussian(0.3, predict=True).install(teacher.eval(), 0)
    defense, draws = Distill(PGD(steps=1), teacher), generator()
    losses = []
    for stream in (draws, draws, generator()):
        found = asked(defense, network(), *batch(), draws=stream)
        losses.append(found.loss.item())
    assert losses[0] == losses[2] != losses[1]


def test_attacks_with_labels_are_refused() -> None:
    with pytest.raises(InputError, match=r"^attack\.label=least_likely is not allowed"):
        Distill(FGSM(label="least_likely"), network())
    with pytest.raises(InputError, match=r"^alpha=1\.1 is not allowed"):
        Distill(FGSM(), network(), 1.1)


# The teacher of a run

DATA = Synthetic(list(SHAPE), 3, train_size=60, test_size=20, validation=20)


def saved(folder: Path, pixels: int, classes: int) -> Path:
    """The directory of a run whose model is for so many pixels and classes."""
    folder.mkdir()
    config: dict[str, Any] = {"norm": "linf", "eps": 0.25, "seed": 1, "data_dir": "data"}
    config["model"] = {"_target_": "robusttrain.models.mlp.MLP", "widths": [5]}
    config["noise"] = {"_target_": "robusttrain.noise.none.NoNoise"}
    model = MLP([5]).build(classes, (1, 2, pixels // 2))
    shape = [1, 2, pixels // 2]
    Checkpoint(model.state_dict(), classes, shape, config, {}, 1, {}).save(folder / "best.pt")
    return folder


def run(folder: Path, teacher: Path, stages: list[Stage], given: Path | None = None) -> None:
    folder.mkdir()
    config = Config(
        dataset=DATA, model=MLP([8]), noise=NoNoise(), attack=FGSM(eps=0.1),
        defense=Distill(FGSM(eps=0.1), str(teacher)), optimizer=SGD(0.1), schedule=Constant(),
        weight_perturbation=NoPerturbation(), averaging=NoAveraging(),
        training=Training(epochs=1, batch_size=20, validation_attack=FGSM(eps=0.1)),
        evaluation=Evaluation({"fgsm": FGSM(eps=0.1)}, audit=False), logger=NoLogger(), eps=0.1,
        device="cpu", stages=stages, checkpoint=None if given is None else str(given),
    )  # fmt: skip
    names = dict.fromkeys(("dataset", "model", "defense", "noise"), "x")
    terminal = Terminal(Console(file=io.StringIO()))
    experiment.run(config, Origin({}, names), folder, terminal)


def test_a_run_learns_from_the_model_of_another(tmp_path: Path) -> None:
    teacher = saved(tmp_path / "teacher", 6, 3)
    run(tmp_path / "student", teacher, [Stage.train])
    assert checkpoint.load(tmp_path / "student").num_classes == 3
    # An evaluation of the student does not need the teacher.
    gone = tmp_path / "gone"
    run(tmp_path / "later", gone, [Stage.evaluate], tmp_path / "student")
    assert (tmp_path / "later" / "report.csv").exists()


@pytest.mark.parametrize(
    ("pixels", "classes", "reason"),
    [(6, 4, "not logits of shape"), (8, 3, "cannot take images of shape"), (0, 0, "is not there")],
)
def test_a_teacher_that_does_not_fit_is_refused_by_name_before_any_work(
    pixels: int, classes: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(self: Synthetic) -> Any:
        raise AssertionError("the data was loaded")

    monkeypatch.setattr(Synthetic, "load", loaded)
    teacher = tmp_path / "teacher"
    if classes:
        saved(teacher, pixels, classes)
    with pytest.raises(InputError, match=rf"^defense\.teacher={teacher} .*{reason}"):
        run(tmp_path / "student", teacher, [Stage.train])
    assert not list((tmp_path / "student").iterdir())


def test_a_teacher_that_is_a_module_is_not_loaded() -> None:
    defense = Distill(FGSM(), network())
    assert defense.with_models(lambda key, run: pytest.fail("loaded")) is defense
