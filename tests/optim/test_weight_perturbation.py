"""Adversarial weight perturbation: its size, the step that it gives, and what stays unchanged."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from robusttrain.attacks.pgd import PGD
from robusttrain.data import as_input
from robusttrain.defenses import Defense, Objective
from robusttrain.defenses.alpha_mix import AlphaMix
from robusttrain.defenses.free import Free
from robusttrain.defenses.rt import RT
from robusttrain.defenses.standard import Standard
from robusttrain.defenses.trades import TRADES
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.errors import InputError
from robusttrain.noise.layer import NoiseLayer, Progress, Switches, attach
from robusttrain.noise.learn2perturb import Learn2Perturb
from robusttrain.optim.optimizers import SGD
from robusttrain.optim.weight_perturbation import AWP, WeightPerturbation, perturbed
from robusttrain.training.engine import Batch
from robusttrain.training.precision import Precision
from toys.training import DATA, EPS, network, state_of, trainer

Array = NDArray[np.float64]

FIXED = PGD(eps=EPS, steps=3, random_start=False)
DEFENSES: dict[str, Defense] = {
    "standard": Standard(),
    "alpha_mix": AlphaMix(FIXED),
    "rt": RT(eps=EPS),
    "madry": WorstCase(PGD(eps=EPS, steps=3)),
    "trades": TRADES(PGD(eps=EPS, steps=3)),
    "free": Free(eps=EPS, replays=3),
}


def tensors(seed: int) -> list[Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draws).double() for shape in ((3, 4), (2, 1, 3, 3))]


@settings(max_examples=20, deadline=None)
@given(gamma=st.floats(0, 1), seed=st.integers(0, 99))
def test_each_tensor_moves_up_its_slope_by_gamma_of_its_norm(gamma: float, seed: int) -> None:
    weights, slopes = tensors(seed), tensors(seed + 100)
    offsets = AWP(gamma).offsets(weights, slopes)
    for weight, slope, offset in zip(weights, slopes, offsets, strict=True):
        assert float(offset.norm()) == pytest.approx(gamma * float(weight.norm()))
        along = (offset * slope).sum()
        assert float(along) == pytest.approx(float(offset.norm() * slope.norm()))


def test_where_there_is_no_slope_nothing_moves() -> None:
    (weight, _), flat = tensors(0), torch.zeros(3, 4).double()
    assert torch.equal(*AWP().offsets([weight], [flat]), flat)


def test_weights_and_statistics_come_back_bit_for_bit() -> None:
    convolution, norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
    model = nn.Sequential(convolution, norm, nn.ReLU(), nn.Flatten(1), nn.Linear(12, 3))
    Learn2Perturb().install(model, 0)
    x = torch.rand(8, 1, 4, 4)
    model(x)
    model.zero_grad()
    model(x).square().sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with perturbed(model, AWP(0.3).offsets):
        model(x + 1)
        moved = {name for name, v in model.state_dict().items() if not torch.equal(v, before[name])}
    # Only the two weight matrices move: no biases, BatchNorm scales or sizes of noise.
    running = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert moved == {"0.weight", "4.weight"} | running
    assert sum(value.dim() > 1 for value in before.values()) > 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_frozen_weights_stay_and_the_others_get_their_own_offsets() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].requires_grad_(False)
    model(torch.rand(8, 4)).square().sum().backward()
    before = [layer.weight.detach().clone() for layer in model]
    with perturbed(model, AWP(0.3).offsets):
        moved = [layer.weight.detach() - own for layer, own in zip(model, before, strict=True)]
    assert not moved[1].any()
    for number in (0, 2):
        slope = model[number].weight.grad
        expected = 0.3 * before[number].norm() * slope / slope.norm()
        torch.testing.assert_close(moved[number], expected)


def test_weights_are_restored_if_the_step_fails() -> None:
    model = network()
    model(torch.rand(8, 1, 4, 4)).sum().backward()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="lost"), perturbed(model, AWP().offsets):
        raise RuntimeError("lost")
    assert torch.equal(state_of(model), before)


def loss_and_slopes(weights: list[Array], x: Array, y: Array) -> tuple[float, list[Array]]:
    """Cross-entropy of W2 tanh(W1 x + b1) + b2 and its gradient, in NumPy."""
    w1, b1, w2, b2 = weights
    hidden = np.tanh(x @ w1.T + b1)
    raised = np.exp(hidden @ w2.T + b2)
    p = raised / raised.sum(1, keepdims=True)
    at_logits = (p - np.eye(3)[y]) / len(y)
    at_hidden = at_logits @ w2 * (1 - hidden**2)
    slopes = [at_hidden.T @ x, at_hidden.sum(0), at_logits.T @ hidden, at_logits.sum(0)]
    return float(-np.log(p[np.arange(len(y)), y]).mean()), slopes


def test_the_step_is_that_of_the_paper() -> None:
    """w - lr grad J(w + v), with v and both gradients by hand in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(1), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3))
    images, y = DATA.load()[0].images[:20], DATA.load()[0].labels[:20]
    x = as_input(images)
    weights = [p.detach().double().numpy() for p in model.parameters()]
    flat = x.flatten(1).double().numpy()
    loss, climb = loss_and_slopes(weights, flat, y.numpy())
    there = [
        w + 0.1 * np.linalg.norm(w) * g / np.linalg.norm(g) if w.ndim > 1 else w
        for w, g in zip(weights, climb, strict=True)
    ]
    _, slopes = loss_and_slopes(there, flat, y.numpy())
    made = trainer(
        Standard(), model=model, optimizer=SGD(0.3, 0.0, 0.0), weight_perturbation=AWP(0.1)
    )
    (objective,) = made.engine.train_batch(Standard(), Batch(x, y), made.history)
    assert float(objective.loss) == pytest.approx(loss, rel=1e-6)
    for value, w, slope in zip(model.parameters(), weights, slopes, strict=True):
        np.testing.assert_allclose(value.detach().numpy(), w - 0.3 * slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("defense", DEFENSES.values(), ids=DEFENSES)
def test_offsets_of_size_zero_change_nothing(defense: Defense) -> None:
    """Bit for bit, including the statistics of BatchNorm and the state of Free."""
    plain, none = (
        trainer(replace(defense), weight_perturbation=wp)  # type: ignore[type-var]
        for wp in (None, AWP(0.0))
    )
    for made in (plain, none):
        list(made.epochs())
    assert torch.equal(state_of(plain.model), state_of(none.model))


class Pull(NoiseLayer):
    """A mechanism without noise, but with a penalty on the weights that it is attached to."""

    def __init__(self, pulled: Tensor) -> None:
        super().__init__(Switches(), 0)
        self.pulled = pulled

    def penalty(self, progress: Progress) -> Tensor:
        return self.pulled.square().sum()


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_at_size_zero_the_second_gradient_is_the_first(precision: Precision, weight: float) -> None:
    """Also with a penalty, in the precision of the training, and weighted among processes."""
    ends = []
    for perturbation in (None, AWP(0.0)):
        model = plain()
        attach(model, Pull(model[1].weight))
        made = trainer(model=model, weight_perturbation=perturbation, precision=precision)
        x, y = as_input(made.train.images[:40]), made.train.labels[:40]
        made.engine.train_batch(made.defense, Batch(x, y, weight=weight), made.history)
        ends.append(state_of(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("defense", [Standard(), RT(eps=EPS), WorstCase(FIXED), AlphaMix(FIXED)])
def test_a_batch_in_parts_is_perturbed_as_a_whole_one(defense: Defense) -> None:
    """The offsets come from the gradient of all images."""
    whole, parts = (
        trainer(defense, model=plain(), weight_perturbation=AWP(0.2), epochs=1, batch_size=100)
        for _ in range(2)
    )
    parts.history.microbatch_size = 40
    for made in (whole, parts):
        list(made.epochs())
    torch.testing.assert_close(state_of(parts.model), state_of(whole.model), rtol=0, atol=2e-6)


def plain() -> nn.Module:
    """A network without BatchNorm, which would normalise each part separately."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(1), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


class _Counting(nn.Module):
    """Counts forward passes as f, and backward passes as b (to weights) or i (to the input)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.seen = network, Counter[str]()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        held = not any(p.requires_grad for p in self.parameters())
        self.seen["f"] += 1
        if logits.requires_grad:
            logits.register_hook(lambda gradient: self.seen.update("i" if held else "b"))
        return logits


@pytest.mark.parametrize(
    ("name", "make", "passes"),
    [
        ("standard", network, {"f": 2, "b": 2}),
        ("alpha_mix", network, {"f": 7, "i": 3, "b": 4}),
        ("madry", network, {"f": 5, "i": 3, "b": 2}),
        # The clean pass serves the attack, and the objective at the weights themselves.
        ("trades", plain, {"f": 7, "i": 3, "b": 4}),
        # With BatchNorm it does not serve the attack, which needs the model in another mode.
        ("trades", network, {"f": 8, "i": 3, "b": 4}),
        ("free", network, {"f": 6, "b": 6}),
    ],
)
def test_it_costs_a_second_objective_and_no_second_attack(
    name: str, make: Callable[[], nn.Module], passes: dict[str, int]
) -> None:
    model = _Counting(make())
    made = trainer(DEFENSES[name], model=model, weight_perturbation=AWP())
    images = DATA.load()[0]
    model.train()
    made.engine.train_batch(
        made.defense, Batch(as_input(images.images[:10]), images.labels[:10]), made.history
    )
    assert model.seen == passes


def test_the_warm_up_has_no_perturbation() -> None:
    """Two epochs of four batches each, the first of them without perturbation."""
    late, plain, always = (
        trainer(WorstCase(FIXED), weight_perturbation=wp)
        for wp in (AWP(0.3, warmup=0.5), None, AWP(0.3))
    )
    epochs = [made.epochs() for made in (late, plain, always)]
    for each in epochs:
        next(each)
    assert torch.equal(state_of(late.model), state_of(plain.model))
    assert not torch.equal(state_of(late.model), state_of(always.model))
    for each in epochs:
        next(each)
    assert not torch.equal(state_of(late.model), state_of(plain.model))


class Mine:
    """A defense of a user's own, with nothing but the two methods."""

    def inner(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> dict[str, Tensor]:
        return {"images": x}

    def outer(
        self, model: nn.Module, x: Tensor, found: dict[str, Tensor], y: Tensor, **keys: Any
    ) -> Objective:
        return Objective(nn.functional.cross_entropy(model(found["images"]), y))


def test_a_defense_of_the_users_own_is_perturbed_like_any_other() -> None:
    mine, standard = (
        trainer(defense, weight_perturbation=AWP(0.1)) for defense in (Mine(), Standard())
    )
    for made in (mine, standard):
        list(made.epochs())
    torch.testing.assert_close(state_of(mine.model), state_of(standard.model), rtol=0, atol=1e-6)


def test_anything_but_a_defense_is_refused() -> None:
    with pytest.raises(InputError, match=r"^defense=function is not allowed: .* inner and outer"):
        trainer(lambda model, x, y: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gamma": -0.1}, "gamma=-0.1"),
        ({"gamma": float("nan")}, "gamma=nan"),
        ({"warmup": 1.5}, "warmup=1.5"),
    ],
)
def test_bad_settings_are_refused_by_name(keys: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AWP(**keys)


class Nowhere:
    """A perturbation of a user's own."""

    def at(self, progress: float) -> Any:
        return lambda weights, slopes: [torch.full_like(weight, torch.nan) for weight in weights]


def test_a_step_with_a_non_finite_perturbed_loss_can_be_skipped() -> None:
    nowhere: WeightPerturbation = Nowhere()
    made = trainer(Standard(), weight_perturbation=nowhere, epochs=1, on_nonfinite="skip")
    before = state_of(made.model)
    first = DATA.load()[0].take(torch.arange(10))
    made.engine.train_batch(made.defense, Batch(as_input(first.images), first.labels), made.history)
    assert torch.equal(state_of(made.model), before)
