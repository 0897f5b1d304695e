"""Averaged weights: what enters them, where they are used, and that they change nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR

from robusttrain.attacks.fgsm import FGSM
from robusttrain.checkpoints import checkpoint
from robusttrain.data import as_input
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.errors import InputError
from robusttrain.noise.gaussian import Gaussian
from robusttrain.optim.averaging import EMA, SWA, Average, Averaging, TrainingStep
from robusttrain.optim.schedules import Constant
from robusttrain.training.checkpointing import TrainingRun
from robusttrain.training.trainer import Trainer
from toys.training import EPS, network, state_of, trainer

AVERAGES: list[Averaging] = [EMA(0.8), SWA(0.3)]


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def moved(settings: Averaging, steps: int, per_epoch: int) -> tuple[np.ndarray, Average]:
    """Random weights after each step, and their average."""
    model = nn.Linear(2, 2, bias=False).double()
    average, places = Average(model, settings), torch.randn(steps, 2, 2).double()
    for number, place in enumerate(places, 1):
        model.weight.data.copy_(place)
        average.update(number / steps, ends_epoch=number % per_epoch == 0)
    return places.numpy(), average


@given(decay=st.floats(0, 0.999), steps=st.integers(1, 40))
def test_ema_is_the_recursion_of_its_decays(decay: float, steps: int) -> None:
    places, average = moved(EMA(decay), steps, 1)
    expected = places[0]
    for number, place in enumerate(places):
        kept = min(decay, (1 + number) / (10 + number))
        expected = kept * expected + (1 - kept) * place
    np.testing.assert_allclose(average.weights[0].numpy(), expected, rtol=1e-12, atol=1e-12)


@given(
    start=st.sampled_from([0, 0.25, 0.5, 0.75, 0.99]),
    epochs=st.integers(1, 8),
    per_epoch=st.integers(1, 5),
)
def test_swa_is_the_mean_of_the_ends_of_epochs(start: float, epochs: int, per_epoch: int) -> None:
    places, average = moved(SWA(start), epochs * per_epoch, per_epoch)
    ends = places[per_epoch - 1 :: per_epoch]
    counted = [end for number, end in enumerate(ends, 1) if number / epochs > start]
    assert average.updates == len(counted) >= 1
    mean = np.mean(counted, 0)
    # Weights of about 1 may cancel, and leave their rounding.
    np.testing.assert_allclose(average.weights[0].numpy(), mean, rtol=1e-12, atol=1e-14)


def test_averaging_does_not_change_the_training() -> None:
    plain, swa = (trainer(averaging=averaging, epochs=4) for averaging in (None, SWA(0.5)))
    ends = [parameters(plain.model) for _ in plain.epochs()]
    for _ in swa.epochs():
        pass
    assert torch.equal(state_of(swa.model), state_of(plain.model))
    with swa.averaged():
        torch.testing.assert_close(
            parameters(swa.model), (ends[2] + ends[3]) / 2, rtol=1e-6, atol=1e-8
        )


@pytest.mark.parametrize("averaging", AVERAGES)
def test_installing_the_average_changes_no_training(averaging: Averaging) -> None:
    """Not even where noise, dropout and the order of images draw random numbers."""
    results = []
    for looks in (False, True):
        model = network()
        model.append(nn.Dropout(0.2))
        Gaussian(0.2).install(model, 5)
        torch.manual_seed(3)
        made = trainer(WorstCase(FGSM(eps=EPS)), model=model, averaging=averaging, epochs=3)
        for epoch in made.batches():
            if looks and epoch is None:
                before = state_of(made.model)
                with made.averaged():
                    assert made.model.training
                assert torch.equal(state_of(made.model), before)
        results.append(state_of(made.model))
    assert torch.equal(*results)


def test_swa_recomputes_the_statistics_of_batch_norm() -> None:
    made = trainer(averaging=SWA(0.5), batch_size=100)
    list(made.epochs())
    x = as_input(made.train.images)
    with made.averaged(), torch.no_grad():
        norm = made.model[2]
        before = made.model[:2](x)
        torch.testing.assert_close(norm.running_mean, before.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var, before.var(0), rtol=1e-5, atol=1e-6)


class Frozen(nn.BatchNorm1d):
    """As for fine-tuning, the layer stays in eval mode."""

    def train(self, mode: bool = True) -> "Frozen":
        super().train(False)
        return self


def test_swa_leaves_frozen_layers_alone() -> None:
    model = network()
    model.append(Frozen(3))
    model[-1].running_mean.fill_(0.3)
    model[-1].running_var.fill_(2.0)
    made = trainer(model=model, averaging=SWA(0.0), epochs=1)
    list(made.epochs())
    with made.averaged():
        assert model[-1].running_mean.tolist() == pytest.approx([0.3] * 3)
        assert model[-1].running_var.tolist() == [2.0] * 3
        assert model[2].momentum is not None
    assert (model[2].momentum, model[-1].momentum) == (0.1, 0.1)


def test_ema_leaves_the_statistics_of_batch_norm_to_the_model() -> None:
    made = trainer(averaging=EMA(0.9))
    list(made.epochs())
    own = made.model[2].running_mean.clone()
    with made.averaged():
        assert torch.equal(made.model[2].running_mean, own)


def finished(made: Trainer, folder: Path) -> TrainingRun:
    about: dict[str, Any] = {"num_classes": 3, "image_shape": [1, 4, 4], "config": {}, "names": {}}
    run = TrainingRun(made, folder, about, made.terminal, lambda epoch: None)
    run.finish()
    return run


@pytest.mark.parametrize("averaging", AVERAGES)
def test_averaged_weights_are_validated_and_kept(averaging: Averaging, tmp_path: Path) -> None:
    made = trainer(
        WorstCase(FGSM(eps=EPS)), averaging=averaging, epochs=3, validation_attack=FGSM(eps=EPS)
    )
    best = finished(made, tmp_path).best
    assert best is not None
    model = network(1)
    model.load_state_dict(checkpoint.load(tmp_path / "best.pt").model)
    model.eval()
    images, labels = as_input(made.validation.images), made.validation.labels
    attacked = FGSM(eps=EPS)(model, images, labels)
    right = (model(attacked).argmax(1) == labels) & (model(images).argmax(1) == labels)
    assert best.val_robust_accuracy == pytest.approx(right.double().mean().item())
    # Training resumes from the weights themselves.
    last = checkpoint.load(tmp_path / "checkpoint.pt")
    model.load_state_dict(last.model)
    with made.averaged():
        pass
    assert not torch.equal(parameters(model), parameters(made.model))
    assert last.training["average"]["taken"] == made.engine.average.updates


@pytest.mark.parametrize("averaging", AVERAGES)
@pytest.mark.parametrize("batches", [0, 1, 4, 6])
def test_an_average_is_resumed_where_it_was(
    averaging: Averaging, batches: int, tmp_path: Path
) -> None:
    whole = trainer(averaging=averaging, epochs=2)
    list(whole.batches())
    stopped = trainer(averaging=averaging, epochs=2)
    for _, _ in zip(range(batches), stopped.batches(), strict=False):
        pass
    torch.save({"model": stopped.model.state_dict(), **stopped.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = trainer(averaging=averaging, epochs=2)
    again.model.load_state_dict(saved.pop("model"))
    again.load_state_dict(saved)
    list(again.batches())
    found = []
    for made in (whole, again):
        with made.averaged():
            found.append(state_of(made.model))
    assert torch.equal(*found)


def test_a_loaded_state_is_not_changed_by_the_average() -> None:
    model = nn.Linear(2, 2)
    state = {"taken": 1, "weights": [parameter.detach() + 1 for parameter in model.parameters()]}
    kept = [weight.clone() for weight in state["weights"]]
    average = Average(model, EMA(0.5))
    average.load_state_dict(state)
    average.update(0.5, ends_epoch=False)
    assert all(torch.equal(*pair) for pair in zip(state["weights"], kept, strict=True))


class Latest:
    """An average of a user's own, which is not `Recomputing`."""

    def share(self, step: TrainingStep) -> float:
        return 1.0


def test_an_average_of_a_users_own_keeps_the_statistics_of_the_model() -> None:
    made = trainer(averaging=Latest())
    list(made.epochs())
    own = state_of(made.model)
    with made.averaged():
        assert torch.equal(state_of(made.model), own)


def test_bad_settings_are_refused_by_name() -> None:
    for decay in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match=rf"^decay={decay} is not allowed"):
            EMA(decay)
    for start in (-0.1, 1.0):
        with pytest.raises(InputError, match=rf"^start={start} is not allowed"):
            SWA(start)


def test_a_schedule_of_a_users_own_need_not_count() -> None:
    class Chained:
        def build(self, optimizer: Any, total_steps: int) -> Any:
            return ChainedScheduler([LambdaLR(optimizer, lambda step: 1.0)])

    own, known = (
        trainer(averaging=SWA(0.5), schedule=schedule) for schedule in (Chained(), Constant())
    )
    for made in (own, known):
        list(made.epochs())
    assert own.engine.average.updates == known.engine.average.updates == 1
    assert torch.equal(own.engine.average.weights[0], known.engine.average.weights[0])
