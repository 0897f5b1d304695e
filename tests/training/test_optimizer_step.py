"""Steps whose loss or gradient is non-finite: they stop training, are skipped or rolled back."""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from robusttrain.attacks.pgd import PGD
from robusttrain.checkpoints import checkpoint
from robusttrain.defenses import Defense, Objective
from robusttrain.defenses.standard import Standard
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.errors import InputError, NonFiniteLossError
from robusttrain.noise.gaussian import Gaussian
from robusttrain.optim.optimizers import SGD, Adam, AdamW, Optimizer
from robusttrain.optim.schedules import OneCycle
from robusttrain.report.terminal import Terminal
from robusttrain.training import trainer as training
from robusttrain.training.checkpointing import TrainingRun
from robusttrain.training.engine import Batch
from robusttrain.training.metrics import Epoch
from robusttrain.training.settings import Training
from robusttrain.training.trainer import Trainer
from toys.training import DATA, EPS, Diverging, network, state_of, trainer

NAN, INF = float("nan"), float("inf")


@dataclass
class Own:
    """An optimiser that is not fused, as a user's own may be."""

    lr: float = 0.1

    def build(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(parameters, lr=self.lr, momentum=0.9)


OPTIMIZERS = [SGD(0.1), SGD(0.1, 0.0, 0.0), SGD(0.1, nesterov=True), Adam(), AdamW(), Own()]


def linear(weights: Tensor, slope: Tensor) -> Tensor:
    return (weights * slope).sum()


def edge(weights: Tensor, slope: Tensor) -> Tensor:
    """Finite itself, with an infinite slope."""
    return (weights - weights.detach()).abs().sqrt().sum()


class Given(Defense):
    """A defense whose loss is a function of the weights, whatever the images."""

    function: Callable[[Tensor, Tensor], Tensor]
    slope: Tensor

    def outer(self, model: nn.Module, *arguments: Any, **keys: Any) -> Objective:
        (weights,) = model.parameters()
        return Objective(self.function(weights, self.slope))


def descended(made: Trainer, function: Callable[[Tensor, Tensor], Tensor], slope: Tensor) -> Tensor:
    """The loss of a step along the gradient of `function`."""
    assert isinstance(made.defense, Given)
    made.defense.function, made.defense.slope = function, slope
    batch = Batch(torch.zeros(1, 1, 4, 4), torch.zeros(1).long())
    (objective,) = made.engine.train_batch(made.defense, batch, made.history)
    return objective.loss


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize(
    "bad", [(linear, NAN), (linear, INF), (edge, 0.0)], ids=["nan", "inf", "slope"]
)
def test_a_skipped_step_leaves_no_trace(
    optimizer: Optimizer, bad: tuple[Callable[[Tensor, Tensor], Tensor], float], clip: float | None
) -> None:
    """This holds for the first step too, when the optimiser has no state yet."""
    slopes = [torch.full((3,), value) for value in (1.0, -2.0, 0.5)]
    weights, losses = [], []
    for places in ((), (0,), (1, 2)):
        model = nn.ParameterList([nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))])
        made = trainer(
            Given(), model=model, optimizer=optimizer, clip_gradient=clip, on_nonfinite="skip"
        )
        for number, slope in enumerate(slopes):
            steps = [(linear, slope)]
            if number in places:
                steps.insert(0, (bad[0], torch.full((3,), bad[1])))
            for function, at in steps:
                losses.append(descended(made, function, at))
        weights.append(model[0].detach())
    assert all(torch.equal(weights[0], other) for other in weights[1:])
    # Not every non-finite number is a NaN, and a finite loss may have a non-finite gradient.
    assert sum(not loss.isfinite() for loss in losses) == 3
    assert weights[0].isfinite().all()


def test_the_factor_of_the_learning_rate_scales_the_step() -> None:
    model = nn.ParameterList([nn.Parameter(torch.zeros(1))])
    made = trainer(Given(), model=model, optimizer=SGD(0.1, 0.0, 0.0))
    made.history.lr_factor = 0.25
    descended(made, linear, torch.tensor([2.0]))
    assert model[0].item() == pytest.approx(-0.05)
    assert made.engine.optimizer.param_groups[0]["lr"] == 0.1


# Training


@dataclass
class Poisoned(Standard):
    """Standard training, on images that are `value` at the steps in `at`."""

    at: tuple[int, ...]
    value: float = NAN
    step: int = 0

    def outer(self, model: nn.Module, x: Tensor, *arguments: Any, **keys: Any) -> Objective:
        self.step += 1
        images = torch.full_like(x, self.value) if self.step in self.at else x
        return super().outer(model, images, *arguments, **keys)


def leave_out(made: Trainer, at: tuple[int, ...]) -> None:
    """Skip the steps in `at` altogether, as if there were no such batches."""
    engine, train_batch = made.engine, made.engine.train_batch

    def train_unless_left_out(*arguments: Any) -> list[Objective]:
        if engine.batches + 1 not in at:
            return train_batch(*arguments)
        engine.scheduler.step()
        engine.batches += 1
        return []

    engine.train_batch = train_unless_left_out  # type: ignore[method-assign]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("at", [(1,), (6,), (4, 7, 8)])
def test_skipping_harms_neither_weights_nor_statistics_nor_schedule(
    at: tuple[int, ...], value: float
) -> None:
    kept, epochs = [], []
    for poisoned in (True, False):
        defense = Poisoned(at, value) if poisoned else Standard()
        made = trainer(defense, epochs=2, schedule=OneCycle(), on_nonfinite="skip")
        if not poisoned:
            leave_out(made, at)
        epochs.append(list(made.epochs()))
        steps_taken = torch.tensor([made.engine.scheduler.last_epoch])
        kept.append(torch.cat([state_of(made.model), steps_taken]))
    assert torch.equal(*kept)
    # Four batches an epoch.
    counts = [sum(4 * epoch < step <= 4 * epoch + 4 for step in at) for epoch in range(2)]
    assert [epoch.non_finite for epoch in epochs[0]] == counts
    for ours, without in zip(*epochs, strict=True):
        assert ours.loss == pytest.approx(without.loss, rel=1e-12)


def test_images_whose_logits_are_not_finite_are_not_right() -> None:
    made = trainer(Poisoned((1, 2, 3)), epochs=1, on_nonfinite="skip")
    (epoch,) = made.epochs()
    assert epoch.train_clean_accuracy is not None
    # At most four images were counted as correct.
    assert epoch.train_clean_accuracy <= 4 / made.train.size


def test_an_epoch_with_nothing_finite_in_it_stops_the_training() -> None:
    made = trainer(Poisoned((5, 6, 7, 8)), epochs=3, on_nonfinite="skip")
    with pytest.raises(NonFiniteLossError, match="no loss of epoch 2 was finite"):
        list(made.epochs())


def test_weights_that_overflow_behind_the_last_loss_stop_the_training() -> None:
    steep = Diverging(1, 1e3)
    made = trainer(steep, optimizer=SGD(3e38, 0.0, 0.0), epochs=1, batch_size=100)
    with pytest.raises(NonFiniteLossError, match="non-finite weights in epoch 1"):
        list(made.epochs())


# Rollback


@dataclass
class Fragile(WorstCase):
    """Adversarial training whose loss is NaN where weights are longer than `most`."""

    most: float = INF

    def outer(self, model: nn.Module, *arguments: Any, **keys: Any) -> Objective:
        length = nn.utils.parameters_to_vector(model.parameters()).norm()
        objective = super().outer(model, *arguments, **keys)
        broken = torch.where(length > self.most, torch.nan, 1.0)
        return objective._replace(loss=objective.loss * broken)


def fragile(most: float = 4.6, **settings: Any) -> Trainer:
    """A training that draws from every random stream there is."""
    model = network()
    model.append(nn.Dropout(0.1))
    Gaussian(0.1).install(model, 5)
    torch.manual_seed(3)
    data = replace(DATA, crop=1, flip=True)
    keys = {"optimizer": SGD(0.5), "epochs": 4, "on_nonfinite": "rollback", **settings}
    defense = Fragile(PGD(eps=EPS, steps=1), most)
    return trainer(defense, model=model, data=data, **keys)


def figures(epochs: list[Epoch]) -> list[dict[str, Any]]:
    return [{**epoch.row(), "seconds": 0} for epoch in epochs]


def test_an_epoch_is_restarted_at_half_the_learning_rate() -> None:
    """The result is that of half the rate from there on, without a trace of the failed attempt."""
    made = fragile()
    epochs = list(made.epochs())
    counts = [epoch.rollbacks for epoch in epochs]
    # What the test needs: a whole epoch before the first rollback, and two rollbacks of one epoch.
    assert counts == [0, 0, 2, 1]
    assert [epoch.lr for epoch in epochs] == pytest.approx([0.5, 0.5, 0.125, 0.0625])
    plain = fragile(most=INF)
    for epoch in plain.epochs():
        plain.history.lr_factor = 0.25 if epoch.epoch == 2 else 0.125 if epoch.epoch == 3 else 1.0
    assert torch.equal(state_of(made.model), state_of(plain.model))


def test_streams_that_began_in_a_failed_attempt_are_reset() -> None:
    """Noise layers create their streams when they first draw."""
    ends = []
    for at, share in (((2,), 1.0), ((), 0.5)):
        model = network()
        Gaussian(0.1).install(model, 5)
        made = trainer(Poisoned(at), model=model, epochs=1, on_nonfinite="rollback")
        made.history.lr_factor = share
        list(made.epochs())
        assert made.history.lr_factor == 0.5
        ends.append(state_of(model))
    assert torch.equal(*ends)


def test_when_losses_are_checked_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for every in (1, 50):
        monkeypatch.setattr(training, "BATCHES_BETWEEN_CHECKS", every)
        made = fragile()
        rows = figures(list(made.epochs()))
        ends.append((state_of(made.model), rows))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_a_training_that_rolls_back_can_be_resumed_from_any_batch(tmp_path: Path) -> None:
    whole = fragile()
    expected = figures(list(whole.epochs()))
    made, done, taken = fragile(), [], 0
    for epoch in made.batches():
        done += [] if epoch is None else [epoch]
        if not made.all_finite:
            continue
        taken += 1
        path = tmp_path / "state.pt"
        torch.save({"model": made.model.state_dict(), **made.state_dict()}, path)
        saved = torch.load(path, weights_only=True)
        # Both draw from torch's own stream.
        with torch.random.fork_rng():
            other = fragile()
            other.model.load_state_dict(saved.pop("model"))
            other.load_state_dict(saved)
            assert figures(done + list(other.epochs())) == expected
        assert torch.equal(state_of(other.model), state_of(whole.model))
    assert taken > 16, "the batches of the broken attempts come on top"


def test_three_rollbacks_are_enough() -> None:
    said = io.StringIO()
    made = fragile(most=0.0)
    made.terminal = Terminal(Console(file=said, width=300))
    message = r"epoch 1, batch 1, at learning rate 0\.0625; .* \(3 rollbacks did not help\)"
    with pytest.raises(NonFiniteLossError, match=message):
        list(made.epochs())
    assert said.getvalue().count("restarting epoch 1 at half the learning rate: the loss") == 3


@pytest.mark.parametrize("wanted", ["stop", "rollback"])
def test_weights_that_are_not_finite_are_never_written(
    wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is due after every batch; losses are checked only when the epoch ends."""
    written = []
    save = checkpoint.Checkpoint.save

    def noted(self: checkpoint.Checkpoint, path: Path) -> None:
        written.append(all(value.isfinite().all() for value in self.model.values()))
        save(self, path)

    monkeypatch.setattr(checkpoint.Checkpoint, "save", noted)
    made = trainer(Poisoned((6,)), epochs=3, on_nonfinite=wanted, checkpoint_minutes=1e-9)
    about: dict[str, Any] = {"num_classes": 3, "image_shape": [1, 4, 4], "config": {}, "names": {}}
    run = TrainingRun(made, tmp_path, about, made.terminal, lambda epoch: None)
    if wanted == "stop":
        with pytest.raises(NonFiniteLossError):
            run.finish()
    else:
        run.finish()
    assert all(written)
    # One at the start, three batches, the end of an epoch and the best.
    assert len(written) >= 6


def test_an_unknown_choice_is_refused() -> None:
    for key in ("on_nonfinite", "on_overfit"):
        with pytest.raises(InputError, match=rf"^{key}=later is not allowed"):
            Training(**{key: "later"})
