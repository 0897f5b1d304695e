"""Networks of unusual make are attacked and trained, and afterwards they are as they were."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from robusttrain.attacks.model_view import Mode
from robusttrain.attacks.pgd import PGD
from robusttrain.data.synthetic import Synthetic
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.errors import InputError
from robusttrain.models import build_model
from robusttrain.optim.weight_perturbation import AWP
from toys.training import trainer

CLASSES, SHAPE, EPS = 3, (1, 4, 4), 0.1
DATA = Synthetic([*SHAPE], CLASSES, train_size=16, test_size=4, validation=0)


def convolutional(**keys: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, **keys), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, CLASSES),
    )  # fmt: skip


def channels_last() -> nn.Module:
    return convolutional().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Half(nn.Module):
    """A network with weights in bfloat16, which converts its images itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = convolutional().to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x.to(torch.bfloat16))
        return logits


def frozen() -> nn.Module:
    model = convolutional()
    for parameter in model[:2].parameters():
        parameter.requires_grad_(False)
    model[1].eval()
    return model


def normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model = convolutional()
    model[0], model[4] = norm(model[0]), norm(model[4])
    return model


def in_place() -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), *convolutional()[:2], nn.SiLU(inplace=True),
                         *convolutional()[3:])  # fmt: skip


class Attention(nn.Module):
    """Attention as products of matrices, over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x[:, 0]).chunk(3, -1)
        logits: Tensor = self.head(((q @ k.transpose(1, 2)).softmax(-1) @ v).mean(1))
        return logits


class Returning(nn.Module):
    """A network whose forward method returns more than its logits."""

    def __init__(self, wrap: Callable[[Tensor], object], *, in_train_only: bool = False) -> None:
        super().__init__()
        self.layers, self.wrap, self.in_train_only = convolutional(), wrap, in_train_only

    def forward(self, x: Tensor) -> object:
        logits = self.layers(x)
        return logits if self.in_train_only and not self.training else self.wrap(logits)


class Output:
    """As the models of Hugging Face return it."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def tupled(logits: Tensor) -> object:
    return (None, logits, logits[:, :1])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "channels last": channels_last,
    "half precision": Half,
    "frozen layers": frozen,
    "weight norm": lambda: normed(parametrizations.weight_norm),
    "spectral norm": lambda: normed(parametrizations.spectral_norm),
    "orthogonal": lambda: normed(parametrizations.orthogonal),
    "older weight norm": lambda: normed(nn.utils.weight_norm),
    "older spectral norm": lambda: normed(nn.utils.spectral_norm),
    "in-place activations": in_place,
    "attention": Attention,
    "a tuple": lambda: Returning(tupled),
    "a dictionary": lambda: Returning(lambda logits: {"loss": None, "logits": logits}),
    "an object": lambda: Returning(Output),
    "a tuple in train mode": lambda: Returning(tupled, in_train_only=True),
}  # fmt: skip

every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build_model(make(), CLASSES, SHAPE)


def condition(model: nn.Module) -> tuple[object, ...]:
    """Everything of a model that crafting may not change."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        {name: parameter.grad for name, parameter in model.named_parameters()},
    )


def assert_same(one: tuple[object, ...], other: tuple[object, ...]) -> None:
    (state, *flags), (state_after, *flags_after) = one, other
    assert isinstance(state, dict)
    assert isinstance(state_after, dict)
    assert state.keys() == state_after.keys()
    assert all(torch.equal(value, state_after[name]) for name, value in state.items())
    assert flags == flags_after


@pytest.mark.parametrize("mode", list(Mode))
@every_model
def test_a_model_is_attacked_and_is_afterwards_as_it_was(
    make: Callable[[], nn.Module], mode: Mode
) -> None:
    model, x, y = built(make), torch.rand(6, *SHAPE), torch.tensor([0, 1, 2, 0, 1, 2])
    before, given = condition(model), x.clone()
    attack = PGD(eps=EPS, steps=3, mode=mode)
    x_adv = attack(model, x, y, generator=torch.Generator().manual_seed(0))
    assert_same(before, condition(model))
    assert torch.equal(x, given)
    assert 0 < (x_adv - x).abs().max() <= EPS + 1e-6
    with torch.no_grad():
        clean, attacked = (
            nn.functional.cross_entropy(copy.deepcopy(model).eval()(z).float(), y)
            for z in (x, x_adv)
        )
    if mode is Mode.eval:
        assert attacked > clean


@every_model
def test_a_step_of_training_moves_what_is_not_frozen(make: Callable[[], nn.Module]) -> None:
    model = built(make)
    before = {name: value.clone() for name, value in model.named_parameters()}
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    taken = trainer(
        WorstCase(PGD(eps=EPS, steps=2)), model=model, data=DATA, eps=EPS, epochs=1, batch_size=8,
        weight_perturbation=AWP(0.01),
    )  # fmt: skip
    next(taken.batches())
    after = dict(model.named_parameters())
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved
    assert not moved & frozen
    assert {name for name, value in after.items() if not value.requires_grad} == frozen
    assert all(value.isfinite().all() for value in after.values())


@pytest.mark.parametrize("output", [{"scores": 1}, (None,), "text"])
def test_an_output_without_logits_is_refused(output: object) -> None:
    with pytest.raises(InputError, match=r"it returns a (dict|tuple|str), not logits"):
        build_model(Returning(lambda logits: output), CLASSES, SHAPE)
