"""Attacks of other libraries find what their own calls find, and are refused before any work."""

import random
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks.advlib import AdvLib
from robusttrain.attacks.art import ART
from robusttrain.attacks.external import ExternalAttack, drawn_seed, streams_seeded
from robusttrain.attacks.foolbox import Foolbox
from robusttrain.attacks.model_view import QueryCounter
from robusttrain.attacks.torchattacks import Torchattacks
from robusttrain.data import Split
from robusttrain.defenses.trades import TRADES
from robusttrain.errors import InputError
from robusttrain.evaluation import Evaluation, evaluate
from robusttrain.evaluation.validity import invalid_images
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball
from toys.attacks import batchnorm_network, everywhere, generator, tanh_network

KINDS: list[type[ExternalAttack]] = [Foolbox, Torchattacks, ART, AdvLib]
INSTALLED = [kind for kind in KINDS if find_spec(kind.library)]


def needs(library: str) -> ModuleType:
    return pytest.importorskip(library, reason=f"{library} is not installed")


each = pytest.mark.parametrize(
    ("kind", "name"),
    [(Foolbox, "L2PGD"), (Torchattacks, "PGDL2"), (ART, "FastGradientMethod"), (AdvLib, "ddn")],
)


@pytest.fixture
def kept() -> nn.Module:
    """A network in train mode with a gradient and a frozen layer."""
    network = batchnorm_network(1)
    first = network.get_parameter("0.weight")
    first.grad = torch.full_like(first, 0.25)
    network.get_parameter("8.bias").requires_grad_(False)
    return network


def subject() -> tuple[nn.Module, Tensor, Tensor]:
    """A network, 100 images that it classifies, and their classes."""
    network: nn.Module = tanh_network(16, 3).float().eval()
    x = everywhere(100, 1, 4, 4, dtype=torch.float32)
    return network, x, network(x).argmax(1)


# --- the same as the library's own call -----------------------------------------------------------

Call = Callable[[nn.Module, Tensor, Tensor, int], Tensor]


def own_foolbox(attack: str, eps: float, **params: Any) -> Call:
    def call(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        foolbox = needs("foolbox")
        judged = foolbox.PyTorchModel(model, bounds=(0, 1))
        found: Tensor = getattr(foolbox.attacks, attack)(**params)(judged, x, y, epsilons=eps)[1]
        return found

    return call


def own_torchattacks(attack: str, **params: Any) -> Call:
    def call(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        torchattacks = needs("torchattacks")
        found: Tensor = getattr(torchattacks, attack)(model, **params)(x, y)
        return found

    return call


def own_art(attack: str, **params: Any) -> Call:
    def call(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        needs("art")
        from art.attacks import evasion
        from art.estimators.classification import PyTorchClassifier

        shape, loss = tuple(x.shape[1:]), nn.CrossEntropyLoss()
        classifier = PyTorchClassifier(model, loss, shape, 3, clip_values=(0, 1), device_type="cpu")
        made = getattr(evasion, attack)(classifier, batch_size=len(x), verbose=False, **params)
        return torch.from_numpy(made.generate(x=x.numpy(), y=y.numpy()))

    return call


def own_advlib(attack: str, **params: Any) -> Call:
    def call(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        attacks = needs("adv_lib.attacks")
        found: Tensor = getattr(attacks, attack)(model, x, y, **params)
        return found

    return call


LINF, L2 = {"norm": Norm.linf, "eps": 0.1}, {"norm": Norm.l2, "eps": 0.4}
SMALL = {"steps": 5}
SAME: dict[str, tuple[Callable[[], ExternalAttack], Call]] = {
    "foolbox, linf": (
        lambda: Foolbox("LinfPGD", **LINF, params=SMALL),
        own_foolbox("LinfPGD", 0.1, **SMALL),
    ),
    "foolbox, minimal": (
        lambda: Foolbox("L2DeepFoolAttack", **L2), own_foolbox("L2DeepFoolAttack", 0.4)
    ),
    "torchattacks, linf": (
        lambda: Torchattacks("PGD", **LINF), own_torchattacks("PGD", eps=0.1)
    ),
    "torchattacks, l2": (
        lambda: Torchattacks("PGDL2", **L2), own_torchattacks("PGDL2", eps=0.4)
    ),
    "torchattacks, minimal": (
        lambda: Torchattacks("DeepFool", **L2, params=SMALL),
        own_torchattacks("DeepFool", **SMALL),
    ),
    "art, linf": (
        lambda: ART("ProjectedGradientDescent", **LINF, params={"max_iter": 5}),
        own_art("ProjectedGradientDescent", eps=0.1, eps_step=0.1, max_iter=5),
    ),
    "art, minimal": (
        lambda: ART("DeepFool", **L2, params={"max_iter": 5}), own_art("DeepFool", max_iter=5)
    ),
    "advlib, linf": (
        lambda: AdvLib("pgd_linf", **LINF, params=SMALL), own_advlib("pgd_linf", ε=0.1, **SMALL)
    ),
    "advlib, minimal": (
        lambda: AdvLib("fmn", **L2, params={"steps": 20}), own_advlib("fmn", norm=2, steps=20)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_finds_what_the_call_of_the_library_finds(case: str) -> None:
    """With the same seed; minimal perturbations count within the radius, and one more may fall."""
    make, own = SAME[case]
    network, x, y = subject()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    seed = drawn_seed(generator(3))
    with streams_seeded(seed, x.device):
        expected = own(network, x, y, seed)
    attack = make()
    threat = Threat(attack.norm, attack.eps)
    fooled = network(expected).argmax(1) != y
    inside = ball(threat).norm(expected.double() - x) <= attack.eps * (1 + 1e-5)
    images = Split(x, y)
    ledger = evaluate(network, images, Evaluation({"own": attack}), threat=threat, seed=0)
    found = attack(network, x, y, generator=generator(3))
    assert ledger.outcomes["own"].invalid == 0
    assert abs(int((network(found).argmax(1) != y).sum()) - int((fooled & inside).sum())) <= 1
    assert 5 < int((fooled & inside).sum()) < 95
    if "minimal" not in case or case.startswith("foolbox"):
        assert torch.equal(found, expected)


# --- what every attack keeps ----------------------------------------------------------------------


@each
def test_the_model_and_the_random_streams_stay_as_they_were(
    kind: type[ExternalAttack], name: str, kept: nn.Module
) -> None:
    needs(kind.library)
    x, y = everywhere(6, 1, 4, 4, dtype=torch.float32), torch.arange(6) % 3
    before, image = {k: v.clone() for k, v in kept.state_dict().items()}, x.clone()
    modes = [module.training for module in kept.modules()]
    slopes = [parameter.requires_grad for parameter in kept.parameters()]
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]  # noqa: NPY002
    attack = kind(name, Norm.l2, 0.3)
    with torch.no_grad():
        first = attack(kept, x, y, generator=generator(1))
    torch.rand(3)
    torch.set_rng_state(streams[0])
    assert torch.equal(first, attack(kept, x, y, generator=generator(1)))
    assert not invalid_images(first, x, attack.threat, 10).any()
    assert torch.equal(x, image)
    assert [module.training for module in kept.modules()] == modes
    assert [parameter.requires_grad for parameter in kept.parameters()] == slopes
    assert all(torch.equal(v, before[k]) for k, v in kept.state_dict().items())
    gradient = kept.get_parameter("0.weight").grad
    assert gradient is not None
    assert (gradient == 0.25).all()
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]  # noqa: NPY002
    assert torch.equal(after[0], streams[0])
    assert after[1:] == streams[1:]


@each
def test_radius_zero_gives_back_the_images(kind: type[ExternalAttack], name: str) -> None:
    needs(kind.library)
    network, x, y = subject()
    assert torch.equal(kind(name, Norm.l2, 0)(network, x, y), x)


@each
def test_a_cheap_form_does_no_more(kind: type[ExternalAttack], name: str) -> None:
    needs(kind.library)
    network, x, y = subject()
    passes = []
    for attack in (kind(name, Norm.l2, 0.3), kind(name, Norm.l2, 0.3).frugal()):
        counted = QueryCounter(network, 1000)
        attack(counted, x, y, generator=generator())
        passes.append(counted.forward_passes)
    assert passes[1] <= passes[0]


@pytest.mark.parametrize(
    ("kind", "name", "steps", "passes"),
    [
        (Foolbox, "L2PGD", {"steps": 5}, (6, 5)),
        (Torchattacks, "PGDL2", {"steps": 5}, (5, 5)),
        (AdvLib, "ddn", {"steps": 5}, (5, 5)),
    ],
)
def test_passes_count_as_those_of_our_attacks(
    kind: type[ExternalAttack], name: str, steps: dict[str, Any], passes: tuple[int, int]
) -> None:
    """Each step is a pass in each direction; Foolbox looks at the result once more."""
    needs(kind.library)
    network, x, y = subject()
    counted = QueryCounter(network, 30)
    kind(name, Norm.l2, 0.3, steps)(counted, x, y, generator=generator())
    found = counted.forward_passes / len(x), counted.backward_passes / len(x)
    assert found == passes


def test_a_pass_without_gradients_counts_though_the_images_want_some() -> None:
    network, x, _ = subject()
    counted = QueryCounter(network, 30)
    with torch.no_grad():
        counted(x.requires_grad_())
    assert (counted.forward_passes, counted.backward_passes) == (100, 0)


# --- refusals -------------------------------------------------------------------------------------


@each
def test_unknown_names_and_params_are_refused_with_the_nearest(
    kind: type[ExternalAttack], name: str
) -> None:
    needs(kind.library)
    with pytest.raises(InputError, match=f"^name={name}x is not an attack .* near it: .*{name}"):
        kind(name + "x", Norm.l2)
    (argument, *_) = [key for key in kind(name, Norm.l2).arguments if "st" in key]
    with pytest.raises(InputError, match=f"^params.{argument}x=3 is not taken .*{argument}"):
        kind(name, Norm.l2, params={argument + "x": 3})


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        (Foolbox, "LinfPGD", "linf"), (Torchattacks, "PGD", "linf"),
        (Torchattacks, "OnePixel", "l0"), (ART, "CarliniLInfMethod", "linf"),
        (ART, "BasicIterativeMethod", "linf"), (AdvLib, "pgd_linf", "linf"),
    ],
)  # fmt: skip
def test_another_norm_is_refused(kind: type[ExternalAttack], name: str, said: str) -> None:
    needs(kind.library)
    with pytest.raises(InputError, match=f"^name={name} of .* in {said}, not in norm=l2"):
        kind(name, Norm.l2)


@pytest.mark.parametrize(
    ("kind", "name", "params", "message"),
    [
        (Torchattacks, "PGD", {"eps": 0.3}, r"^params\.eps=0\.3 cannot be set: eps sets it"),
        (ART, "FastGradientMethod", {"targeted": True}, r"^params\.targeted=True cannot be set"),
        (ART, "ProjectedGradientDescent", {"max_iter": -1}, r"cannot be built .*max_iter=-1: "),
        (Foolbox, "VirtualAdversarialAttack", {}, r"cannot be built .*'steps'"),
    ],
)
def test_params_that_cannot_be_are_refused(
    kind: type[ExternalAttack], name: str, params: dict[str, Any], message: str
) -> None:
    needs(kind.library)
    norm = Norm.l2 if kind is Foolbox else Norm.linf
    with pytest.raises(InputError, match=message):
        kind(name, norm, params=params)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_package_is_named_with_its_command(
    kind: type[ExternalAttack], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robusttrain.attacks.external.find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"^name=any needs {kind.library}: pip install "):
        kind("any")


@each
def test_a_defense_may_train_with_it_unless_it_needs_its_own_loss(
    kind: type[ExternalAttack], name: str
) -> None:
    needs(kind.library)
    attack = kind(name, Norm.l2, 0.3)
    assert attack.traits.own_objective
    with pytest.raises(InputError, match="attack="):
        TRADES(attack)
