"""The training loop: figures, random streams, refusals, and no use of the test set."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from robusttrain.attacks import Attack
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.pgd import PGD
from robusttrain.checkpoints import checkpoint
from robusttrain.config.run_config import Config, Stage
from robusttrain.data import Split, as_input
from robusttrain.data.synthetic import Synthetic
from robusttrain.defenses import Defense
from robusttrain.defenses.alpha_mix import AlphaMix
from robusttrain.defenses.rt import RT
from robusttrain.defenses.standard import Standard
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.errors import InputError, NonFiniteLossError
from robusttrain.evaluation import Evaluation
from robusttrain.loggers.none import NoLogger
from robusttrain.models.mlp import MLP
from robusttrain.noise import Noise
from robusttrain.noise.gaussian import Gaussian
from robusttrain.noise.none import NoNoise
from robusttrain.optim.averaging import NoAveraging
from robusttrain.optim.optimizers import SGD
from robusttrain.optim.schedules import Constant, OneCycle
from robusttrain.optim.weight_perturbation import NoPerturbation
from robusttrain.runs import experiment
from robusttrain.runs.context import Origin
from robusttrain.training.checkpointing import TrainingRun
from robusttrain.training.curriculum import Curriculum
from robusttrain.training.precision import Precision
from robusttrain.training.settings import Keep, Training
from robusttrain.training.trainer import Trainer
from toys.training import DATA, EPS, Diverging, Twice, network, quiet, state_of, trained, trainer

# Figures


def test_the_loss_and_accuracy_of_an_epoch_are_those_of_its_images() -> None:
    """100 images in batches of 32: a mean over batches would give the last four weight eight."""
    model = nn.Sequential(nn.Flatten(1), nn.Linear(16, 3))
    made = trainer(model=model, optimizer=SGD(1e-12), epochs=1)
    (epoch,) = made.epochs()
    images, labels = as_input(made.train.images), made.train.labels
    assert len(labels) == 100
    with torch.no_grad():
        logits = model(images)
    assert epoch.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    assert epoch.train_clean_accuracy == pytest.approx(accuracy, abs=1e-9)
    assert epoch.train_robust_accuracy is None


def test_each_accuracy_is_given_where_its_logits_were_computed() -> None:
    known = {
        name: (epoch.train_clean_accuracy is not None, epoch.train_robust_accuracy is not None)
        for name, defense in {
            "rt": RT(eps=EPS),
            "worst": WorstCase(FGSM(eps=EPS)),
            "mix": AlphaMix(FGSM(eps=EPS)),
        }.items()
        for epoch in trainer(defense, epochs=1).epochs()
    }
    assert known == {"rt": (True, False), "worst": (False, True), "mix": (True, True)}


def test_the_rate_of_an_epoch_is_that_of_its_first_step() -> None:
    made = trainer(optimizer=SGD(0.2), schedule=OneCycle(0.5), epochs=4, batch_size=50)
    assert [epoch.lr for epoch in made.epochs()] == pytest.approx([0, 0.1, 0.2, 0.1], abs=1e-4)


def test_validation_is_in_eval_mode_and_training_continues_in_train_mode() -> None:
    modes: list[tuple[str, bool]] = []

    class Attack:
        def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Tensor:
            modes.append(("validation", model.training))
            return x

    class Watching(Standard):
        def inner(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Tensor:
            modes.append(("training", model.training))
            return x

    list(trainer(Watching(), validation_attack=Attack(), batch_size=100).epochs())
    assert modes == [("training", True), ("validation", False)] * 2


def test_validation_figures_are_those_of_the_validation_split() -> None:
    made = trainer(validation_attack=FGSM(eps=EPS), epochs=1)
    (epoch,) = made.epochs()
    made.model.eval()
    images, labels = as_input(made.validation.images), made.validation.labels
    attacked = FGSM(eps=EPS)(made.model, images, labels)
    with torch.no_grad():
        right, robust = ((made.model(x).argmax(1) == labels).double() for x in (images, attacked))
    assert epoch.val_clean_accuracy == pytest.approx(right.mean().item(), abs=1e-9)
    assert epoch.val_robust_accuracy == pytest.approx((right * robust).mean().item(), abs=1e-9)
    assert epoch.rank == (epoch.val_robust_accuracy, epoch.val_clean_accuracy, True)


# Random streams


@pytest.mark.parametrize("defense", [Standard(), WorstCase(PGD(eps=EPS, steps=2))])
def test_the_seed_decides_the_weights(defense: Defense) -> None:
    first, again, other = (trained(defense, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("noise", [NoNoise(), Gaussian(0.2), Gaussian(0.2, predict=True)])
@pytest.mark.parametrize("attack", [FGSM(eps=EPS), PGD(eps=EPS, steps=3, restarts=2)])
def test_validation_does_not_change_the_training(noise: Noise, attack: Attack) -> None:
    data = replace(DATA, crop=1, flip=True)
    weights = []
    for validation_attack in (None, attack):
        model = network()
        model.append(nn.Dropout(0.2))
        noise.install(model, 5)
        torch.manual_seed(3)
        defense = WorstCase(PGD(eps=EPS, steps=2))
        weights.append(
            trained(defense, model=model, data=data, validation_attack=validation_attack)
        )
    assert torch.equal(*weights)


def test_the_model_alone_draws_from_the_global_stream() -> None:
    data = replace(DATA, crop=1, flip=True)
    made = trainer(WorstCase(PGD(eps=EPS, steps=2)), data=data, validation_attack=PGD(eps=EPS))
    before = torch.get_rng_state()
    list(made.epochs())
    assert torch.equal(torch.get_rng_state(), before)


# Steps


@pytest.mark.parametrize("size", [1, 33, 65])
def test_one_image_left_over_does_not_stop_batch_norm(size: int) -> None:
    split = DATA.load()[0].take(torch.arange(size))
    if size == 1:
        made = trainer(model=nn.Sequential(nn.Flatten(1), nn.Linear(16, 3)), train=split)
    else:
        made = trainer(train=split)
    assert all(epoch.loss > 0 for epoch in made.epochs())


def test_the_l1_penalty_adds_the_signs_of_weights_to_the_gradient() -> None:
    """Not those of biases or of BatchNorm; in one step of SGD."""
    start, lr, l1 = network().state_dict(), 0.1, 0.01
    ends = []
    for penalty in (0.0, l1):
        made = trainer(
            optimizer=SGD(lr, momentum=0.0, weight_decay=0.0),
            epochs=1,
            batch_size=100,
            l1=penalty,
        )
        list(made.epochs())
        ends.append(made.model.state_dict())
    for name, value in start.items():
        moved = ends[0][name] - ends[1][name]
        expected = lr * l1 * value.sign() if value.dim() > 1 else torch.zeros_like(moved)
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("largest", [1e-3, 0.05, 1e3])
def test_clipping_bounds_the_norm_of_the_whole_gradient(largest: float) -> None:
    """One step of plain gradient descent at rate 1 moves the weights by the gradient itself."""
    moves = []
    for clip in (None, largest):
        made = trainer(optimizer=SGD(1.0, 0.0, 0.0), epochs=1, batch_size=100, clip_gradient=clip)
        before = nn.utils.parameters_to_vector(made.model.parameters()).detach().clone()
        list(made.epochs())
        moves.append(nn.utils.parameters_to_vector(made.model.parameters()).detach() - before)
    raw, clipped = moves
    assert 0.1 < raw.norm() < 1e2
    assert clipped.norm().item() == pytest.approx(min(raw.norm().item(), largest), rel=1e-4)
    cosine = torch.cosine_similarity(raw, clipped, dim=0)
    assert cosine.item() == pytest.approx(1, abs=1e-4)


def test_label_smoothing_is_part_of_the_loss() -> None:
    model = nn.Sequential(nn.Flatten(1), nn.Linear(16, 3))
    made = trainer(model=model, optimizer=SGD(1e-12), epochs=1, label_smoothing=0.3)
    (epoch,) = made.epochs()
    with torch.no_grad():
        logp = model(as_input(made.train.images)).log_softmax(1)
    own = logp.gather(1, made.train.labels[:, None]).squeeze(1)
    assert epoch.loss == pytest.approx((-0.7 * own - 0.3 * logp.mean(1)).mean().item(), rel=1e-5)


def test_every_objective_is_a_step_and_every_batch_a_step_of_the_schedule() -> None:
    made = trainer(Twice(), epochs=1, batch_size=25)
    list(made.epochs())
    assert made.engine.scheduler.last_epoch == 4
    by_hand = network()
    expected = trainer(model=by_hand, epochs=1, batch_size=25)
    optimizer = expected.engine.optimizer
    for x, y in list(_batches(expected)):
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(by_hand(x), y).backward()
            optimizer.step()
    torch.testing.assert_close(state_of(made.model), state_of(by_hand))


def _batches(made: Trainer) -> Iterator[tuple[Tensor, Tensor]]:
    from robusttrain.data import batches

    return batches(made.train, made.settings.batch_size, made.engine.streams["batches"])


def test_the_curriculum_reaches_the_attack() -> None:
    seen: list[tuple[float, int]] = []

    @dataclass
    class Noted(PGD):
        def search(self, *arguments: Any) -> Tensor:
            seen.append((self.eps, self.steps))
            return super().search(*arguments)

    curriculum = Curriculum(eps_warmup=0.5, steps=[1, 3])
    made = trainer(
        WorstCase(Noted(eps=0.5, steps=9)), epochs=4, batch_size=100, curriculum=curriculum
    )
    list(made.epochs())
    assert seen == [(0.25, 1), (0.5, 1), (0.5, 3), (0.5, 3)]


def test_a_curriculum_per_batch_reaches_the_attack_in_every_batch() -> None:
    seen: list[float] = []

    @dataclass
    class Noted(PGD):
        def search(self, *arguments: Any) -> Tensor:
            seen.append(self.eps)
            return super().search(*arguments)

    curriculum = Curriculum(eps_warmup=0.5, per_batch=True)
    made = trainer(WorstCase(Noted(eps=0.5)), epochs=4, batch_size=25, curriculum=curriculum)
    per_epoch = made.batches_per_epoch
    list(made.epochs())
    grown = [0.5 * step / (2 * per_epoch) for step in range(2 * per_epoch)]
    assert seen == pytest.approx([*grown, *[0.5] * 2 * per_epoch])
    assert per_epoch > 1


def test_without_epochs_nothing_happens() -> None:
    made = trainer(epochs=0)
    before = state_of(made.model)
    assert list(made.epochs()) == []
    assert torch.equal(state_of(made.model), before)


# Divergence


@pytest.mark.parametrize(("factor", "word"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_a_non_finite_loss_stops_the_training(factor: float, word: str) -> None:
    # Four batches an epoch: the seventh step is batch 3 of epoch 2.
    made = trainer(Diverging(7, factor), optimizer=SGD(0.025), epochs=5)
    message = rf"loss or its gradient became {word} in epoch 2, batch 3, at learning rate 0\.025"
    with pytest.raises(NonFiniteLossError, match=message):
        list(made.epochs())


def test_settings_out_of_range_are_refused() -> None:
    bad: list[tuple[str, Any]] = [
        ("epochs", -1),
        ("batch_size", 0),
        ("label_smoothing", 1.0),
        ("label_smoothing", -0.1),
        ("clip_gradient", 0.0),
        ("keep", "all"),
    ]
    for key, value in bad:
        with pytest.raises(InputError, match=rf"^{key}={value} is not allowed"):
            Training(**{key: value})


# Which epoch is kept


@dataclass
class OtherTest(Synthetic):
    """The same training set with a test set of random labels."""

    def load(self) -> tuple[Split, Split]:
        train, test = super().load()
        return train, Split(255 - test.images, test.labels.flip(0))


def run(folder: Path, data: Synthetic, defense: Defense | None = None, **training: Any) -> Any:
    folder.mkdir()
    settings: dict[str, Any] = {
        "epochs": 6, "batch_size": 20, "validation_attack": FGSM(eps=EPS), **training,
    }  # fmt: skip
    config = Config(
        dataset=data, model=MLP([8]), noise=NoNoise(), attack=FGSM(eps=EPS),
        # At a rate this high the accuracy rises and falls.
        defense=defense or Standard(), optimizer=SGD(1.0), schedule=Constant(),
        weight_perturbation=NoPerturbation(), averaging=NoAveraging(),
        training=Training(**settings), evaluation=Evaluation(), logger=NoLogger(), eps=EPS,
        device="cpu", stages=[Stage.train],
    )  # fmt: skip
    names = dict.fromkeys(("dataset", "model", "defense", "noise"), "x")
    origin = Origin({}, names)
    return experiment.run(config, origin, folder, quiet())


def test_the_best_epoch_is_chosen_on_the_validation_split(tmp_path: Path) -> None:
    returned = run(tmp_path / "run", DATA, keep=Keep.last)
    table = pd.read_csv(tmp_path / "run/train.csv")
    best = checkpoint.load(tmp_path / "run/best.pt")
    ranks = list(zip(table["val_robust_accuracy"], table["val_clean_accuracy"], strict=True))
    assert max(ranks) == ranks[best.epoch - 1]
    assert best.epoch < 6, "the test needs a training whose last epoch is not its best"
    assert returned == pytest.approx(max(ranks)[0], abs=1e-5)
    assert checkpoint.load(tmp_path / "run/checkpoint.pt").epoch == 6


@pytest.mark.parametrize(
    ("keep", "left"), [(Keep.best, {"best.pt"}), (Keep.last, {"best.pt", "checkpoint.pt"})]
)
def test_a_finished_run_keeps_what_was_asked_for(
    keep: Keep, left: set[str], tmp_path: Path
) -> None:
    run(tmp_path / "run", DATA, keep=keep)
    assert {path.name for path in (tmp_path / "run").glob("*.pt")} == left
    listed = json.loads((tmp_path / "run/manifest.json").read_text())["files"]
    assert {name for name in listed if name.endswith(".pt")} == left


def test_the_best_checkpoint_holds_weights_alone(tmp_path: Path) -> None:
    """Adam keeps two more values for each weight."""
    run(tmp_path / "run", DATA, keep=Keep.last)
    best = checkpoint.load(tmp_path / "run/best.pt")
    assert best.training == {}
    assert checkpoint.load(tmp_path / "run/checkpoint.pt").training.keys() > {"optimizer"}


def test_the_test_set_has_no_part_in_training(tmp_path: Path) -> None:
    keys = ("image_shape", "num_classes", "train_size", "test_size", "noise", "validation")
    other = OtherTest(**{key: getattr(DATA, key) for key in keys})
    kept = []
    for number, data in enumerate((DATA, other)):
        run(tmp_path / str(number), data)
        kept.append(checkpoint.load(tmp_path / str(number)))
    assert kept[0].epoch == kept[1].epoch
    for key, value in kept[0].model.items():
        assert torch.equal(value, kept[1].model[key])


def test_the_files_of_earlier_epochs_survive_a_divergence(tmp_path: Path) -> None:
    # Five batches an epoch.
    with pytest.raises(NonFiniteLossError, match="epoch 3"):
        run(tmp_path / "run", DATA, Diverging(12, float("nan")))
    assert checkpoint.load(tmp_path / "run/checkpoint.pt").epoch == 2
    assert checkpoint.load(tmp_path / "run").epoch in (1, 2)
    assert len(pd.read_csv(tmp_path / "run/train.csv")) == 2
    for value in checkpoint.load(tmp_path / "run/checkpoint.pt").model.values():
        assert value.isfinite().all()


@pytest.mark.parametrize("native", [False, True])
def test_bf16_is_chosen_where_the_device_computes_in_it(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    product = {}
    for precision in Precision:
        with precision.autocast(cpu):
            product[precision.value] = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    chosen = torch.bfloat16 if native else torch.float32
    assert product == {"auto": chosen, "fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("side", [1, 2])
def test_bf16_is_avoided_where_gradients_would_come_from_uninitialised_memory(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a strided convolution over a single pixel, as deep networks have on small images."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    pixels = nn.Sequential(
        nn.AvgPool2d(4 // side), nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip
    pixels.train()
    made = trainer(model=pixels, precision=Precision.auto)
    assert made.engine.ready.precision is (Precision.fp32 if side == 1 else Precision.auto)
    assert pixels.training
    if side == 1:
        with pytest.raises(InputError, match=r"training\.precision=bf16"):
            trainer(model=pixels, precision=Precision.bf16)


def test_a_run_of_a_version_without_a_key_is_not_resumed(tmp_path: Path) -> None:
    saved = checkpoint.Checkpoint({}, 3, [1, 4, 4], {"eps": 0.1}, {}, 1, {})
    saved.save(tmp_path / "checkpoint.pt")
    about: dict[str, Any] = {"config": {"eps": 0.1, "averaging": {"decay": 0.9}}}
    run = TrainingRun(trainer(), tmp_path, about, quiet(), lambda epoch: None)
    with pytest.raises(InputError, match="another configuration: averaging differ"):
        experiment._resume(run, SimpleNamespace(terminal=quiet()))
