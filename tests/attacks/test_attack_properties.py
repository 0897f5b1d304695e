"""What every attack keeps: the ball, the box, the images, the model and the random state."""

import copy
import importlib
import inspect
import pkgutil
import random
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import robusttrain.attacks
from robusttrain.attacks.attack_loss import Label
from robusttrain.attacks.ball_attack import BallAttack
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.model_view import Mode
from robusttrain.attacks.none import NoAttack
from robusttrain.errors import InputError
from robusttrain.noise.layer import NoiseLayer, Switches
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import TOLERANCE, ball
from toys.attacks import (
    ATTACKS,
    RANDOM,
    Make,
    batchnorm_network,
    everywhere,
    generator,
    interior,
)

every_attack = pytest.mark.parametrize("make", ATTACKS.values(), ids=ATTACKS.keys())
every_norm = pytest.mark.parametrize("norm", list(Norm))
every_mode = pytest.mark.parametrize("mode", list(Mode))
random_attacks = pytest.mark.parametrize("make", [ATTACKS[k] for k in RANDOM], ids=RANDOM)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def test_every_attack_has_a_row_here() -> None:
    found = set()
    for info in pkgutil.iter_modules(robusttrain.attacks.__path__):
        module = importlib.import_module(f"robusttrain.attacks.{info.name}")
        found |= {
            value
            for name, value in inspect.getmembers(module, inspect.isclass)
            if issubclass(value, BallAttack) and not name.startswith("_")
        }
    assert found - {BallAttack} == {type(make()) for make in ATTACKS.values()}
    assert is_dataclass(NoAttack)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that an attack must leave as it was."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    return {
        "training": {name: module.training for name, module in modules.items()},
        "tracking": {
            name: module.track_running_stats
            for name, module in modules.items()
            if isinstance(module, nn.BatchNorm2d)
        },
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "grad": {
            name: None if p.grad is None else p.grad.tolist() for name, p in parameters.items()
        },
        "hooks": {name: len(m._forward_hooks) for name, m in modules.items()},
        "state": {name: value.tolist() for name, value in model.state_dict().items()},
    }


def global_streams() -> list[Any]:
    keyed = np.random.get_state(legacy=False)  # noqa: NPY002
    assert isinstance(keyed, dict)
    numpy_state = [keyed["state"]["key"].tolist(), keyed["state"]["pos"]]
    return [torch.get_rng_state().tolist(), numpy_state, random.getstate()]


def network_with_gradients(channels: int, dtype: torch.dtype) -> nn.Module:
    """A BatchNorm network, one of whose parameters has a gradient and one is frozen."""
    network = batchnorm_network(channels, dtype)
    first = network.get_parameter("0.weight")
    first.grad = torch.full_like(first, 0.25)
    network.get_parameter("8.bias").requires_grad_(False)
    return network


@every_attack
@every_norm
@settings(max_examples=10)
@given(
    shape=st.tuples(
        st.integers(1, 3), st.sampled_from([1, 3]), st.integers(2, 4), st.integers(2, 5)
    ),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    eps=st.one_of(st.sampled_from([0.0, 1e-4, 8 / 255]), st.floats(1e-6, 3)),
    label=st.sampled_from(list(Label)),
    mode=st.sampled_from(list(Mode)),
    seed=st.integers(0, 1000),
)
def test_stays_in_the_ball_and_the_box_and_touches_nothing(
    make: Make,
    norm: Norm,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    eps: float,
    label: Label,
    mode: Mode,
    seed: int,
) -> None:
    network = network_with_gradients(shape[1], dtype)
    # Dropout draws from the global stream in train mode whoever calls it.
    network[5] = nn.Identity() if mode is Mode.train else network[5]
    x, y = everywhere(*shape, seed=seed, dtype=dtype), torch.arange(shape[0]) % 3
    kept_x, kept_y, before, streams = x.clone(), y.clone(), snapshot(network), global_streams()

    eps = min(eps, 1.0) if norm is Norm.linf else eps
    attack = make(norm=norm, eps=eps, label=label, mode=mode)
    x_adv = attack(network, x, y, generator=generator(seed))

    assert (x_adv.shape, x_adv.dtype, x_adv.device) == (x.shape, x.dtype, x.device)
    assert not x_adv.requires_grad
    assert x_adv.isfinite().all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    sizes = ball(Threat(norm, eps)).norm(x_adv.double() - x.double())
    assert (sizes <= eps * (1 + TOLERANCE)).all()
    assert torch.equal(x, kept_x)
    assert not x.requires_grad
    assert torch.equal(y, kept_y)
    assert snapshot(network) == before
    assert global_streams() == streams


@pytest.mark.parametrize("name", [key for key in ATTACKS if key != "fgsm_rs"])
@every_norm
def test_the_model_is_never_asked_about_a_point_that_is_not_allowed(name: str, norm: Norm) -> None:
    """The start of FGSM-RS may leave the box, by its definition; no other point of a search may.

    Attacks for minimal perturbations look for the nearest point that fools the model wherever it
    is, and APGD comes from the ball of 3 eps in l1; none of them leaves the box.
    """
    minimal = name.startswith(("fab", "carlini_wagner", "ddn", "deepfool", "decision_based", "fmn"))
    larger = torch.inf if minimal else 3 if name.startswith("apgd") else 1
    radius = 0.3 * (larger if norm is Norm.l1 or larger > 3 else 1)
    network, x = batchnorm_network(1), everywhere(1, 1, 4, 4, dtype=torch.float32)
    asked: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].detach()))
    attack = ATTACKS[name](norm=norm, eps=0.3, label=Label.predicted)
    attack(network, x, torch.tensor([1]), generator=generator())
    points = torch.cat(asked)
    assert points.min() >= 0
    assert points.max() <= 1
    # The other balls lie in that of linf, the one that L-BFGS searches.
    assert ((points - x).abs() <= radius + 1e-6).all()


@every_attack
@every_norm
def test_eps_zero_gives_back_the_images(make: Make, norm: Norm) -> None:
    x = everywhere(4, 1, 4, 4, dtype=torch.float32)
    x_adv = make(norm=norm, eps=0.0)(batchnorm_network(1), x, torch.zeros(4).long())
    assert torch.equal(x_adv, x)


@every_attack
@every_norm
def test_the_same_seed_gives_the_same_images(make: Make, norm: Norm) -> None:
    network, x = batchnorm_network(3), everywhere(4, 3, 4, 4, dtype=torch.float32)
    y, attack = torch.tensor([0, 1, 2, 0]), make(norm=norm, eps=0.2)
    first = attack(network, x, y, generator=generator(1))
    torch.rand(5)
    assert torch.equal(first, attack(network, x, y, generator=generator(1)))


@random_attacks
def test_other_seeds_and_no_generator_give_other_images(make: Make) -> None:
    network, x = batchnorm_network(3), everywhere(4, 3, 4, 4, dtype=torch.float32)
    y, attack = torch.tensor([0, 1, 2, 0]), make(eps=0.2)
    drawn = [attack(network, x, y, generator=generator(seed)) for seed in (1, 2)]
    drawn += [attack(network, x, y) for _ in range(2)]
    assert len({tuple(images.flatten().tolist()) for images in drawn}) == 4


@every_attack
def test_a_generator_of_the_caller_moves_on(make: Make) -> None:
    """Two batches of one run must not share their random starts."""
    network, x = batchnorm_network(3), everywhere(4, 3, 4, 4, dtype=torch.float32)
    y, draws = torch.tensor([0, 1, 2, 0]), generator(1)
    attack = make(eps=0.2)
    first, second = (attack(network, x, y, generator=draws) for _ in range(2))
    assert torch.equal(first, second) == (make not in [ATTACKS[key] for key in RANDOM])


@every_attack
@every_norm
def test_works_without_gradients_around_it(make: Make, norm: Norm) -> None:
    network, x = batchnorm_network(1), everywhere(4, 1, 4, 4, dtype=torch.float32)
    y, attack = torch.tensor([0, 1, 2, 0]), make(norm=norm, eps=0.2)
    expected = attack(network, x, y, generator=generator(1))
    with torch.no_grad():
        assert torch.equal(attack(network, x, y, generator=generator(1)), expected)
        assert not torch.is_grad_enabled()


@every_attack
@every_norm
def test_takes_images_in_channels_last(make: Make, norm: Norm) -> None:
    network, x = batchnorm_network(3, torch.float64), everywhere(4, 3, 4, 5)
    y, attack = torch.tensor([0, 1, 2, 0]), make(norm=norm, eps=0.2)
    x_adv = attack(network, x.to(memory_format=torch.channels_last), y, generator=generator(1))
    assert x_adv.shape == x.shape
    assert (ball(Threat(norm, 0.2)).norm(x_adv - x) <= 0.2 + 1e-9).all()
    if make not in [ATTACKS[key] for key in RANDOM]:
        expected = attack(network, x, y, generator=generator(1))
        assert torch.allclose(x_adv, expected, rtol=0, atol=1e-6)


@every_attack
@pytest.mark.parametrize("device", DEVICES)
def test_stays_on_the_device(make: Make, device: str) -> None:
    network = batchnorm_network(3).to(device)
    x = everywhere(4, 3, 4, 4, dtype=torch.float32).to(device)
    x_adv = make(eps=0.1)(network, x, torch.tensor([0, 1, 2, 0], device=device))
    assert x_adv.device == x.device
    assert (ball(Threat(Norm.linf, 0.1)).norm(x_adv - x) <= 0.1 + 1e-6).all()


@every_attack
@every_mode
def test_everything_is_put_back_when_the_model_fails(make: Make, mode: Mode) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError

    network = network_with_gradients(3, torch.float32)
    network.append(Broken())
    before = snapshot(network)
    x, y = everywhere(4, 3, 4, 4, dtype=torch.float32), torch.tensor([0, 1, 2, 0])
    # The gradient-free attack asks the model only for the label.
    attack = make(eps=0.1, mode=mode, label=Label.predicted)
    with pytest.raises(ArithmeticError):
        attack(network, x, y)
    assert snapshot(network) == before


def signs_of_the_gradient(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    point = x.clone().requires_grad_()
    nn.functional.cross_entropy(network(point), y, reduction="sum").backward()
    assert point.grad is not None
    return point.grad.sign()


def test_crafting_in_train_mode_uses_the_statistics_of_the_batch() -> None:
    network, x = batchnorm_network(3), interior(6, 3, 4, 4, dtype=torch.float32)
    network[5], y = nn.Identity(), torch.tensor([0, 1, 2] * 2)
    gradients = {
        Mode.eval: signs_of_the_gradient(copy.deepcopy(network).eval(), x, y),
        Mode.train: signs_of_the_gradient(copy.deepcopy(network).train(), x, y),
    }
    assert not torch.equal(gradients[Mode.eval], gradients[Mode.train])
    for mode, expected in gradients.items():
        x_adv = FGSM(eps=0.1, mode=mode)(network, x, y)
        assert torch.allclose(x_adv, x + 0.1 * expected)


class Recorder(NoiseLayer):
    """Writes down the mode that it is called in."""

    def __init__(self) -> None:
        super().__init__(Switches(), seed=0)
        self.modes: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.modes.add(self.training)
        return x


@every_mode
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [key for key in ATTACKS if key != "uniform"])
def test_noise_keeps_the_mode_that_it_is_in(name: str, training: bool, mode: Mode) -> None:
    network = nn.Sequential(Recorder(), *batchnorm_network(3)).train(training)
    network[6] = nn.Identity()
    x, y = everywhere(4, 3, 4, 4, dtype=torch.float32), torch.tensor([0, 1, 2, 0])
    ATTACKS[name](eps=0.1, mode=mode)(network, x, y)
    assert network[0].modes == {training}
    assert network[0].training is training


@every_attack
@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf")])
def test_an_impossible_radius_is_refused_by_name(make: Make, eps: float) -> None:
    with pytest.raises(InputError, match=f"^eps={eps} "):
        make(eps=eps)


@pytest.mark.parametrize("key", ["norm", "label", "mode"])
def test_a_word_that_is_no_choice_is_refused_by_name(key: str) -> None:
    with pytest.raises(InputError, match=f"^{key}=sideways .*one of "):
        FGSM(**{key: "sideways"})
