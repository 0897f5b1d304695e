"""Places of noise: the input, the first layer with weights, any layer by name."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robusttrain.errors import InputError
from robusttrain.noise.gaussian import Gaussian
from robusttrain.noise.layer import noise_layers
from toys.noise import images, layer_of, network, seeded


def by_hand(model: nn.Sequential, x: Tensor, place: int) -> Tensor:
    """The model with the noise of seed 7 before its layer number `place`."""
    z = model[:place](x)
    noise = torch.empty_like(z).normal_(0, 0.3, generator=seeded(7))
    return model[place:](z + noise)


@pytest.mark.parametrize(
    ("at", "place"), [("input", 0), ("first", 1), ("0", 1), ("2", 3), ("3", 4), ("5", 6)]
)
def test_noise_is_exactly_at_the_given_place(at: str, place: int) -> None:
    model, plain, x = network().eval(), network().eval(), images()
    Gaussian(0.3, at=at, predict=True).install(model, 7)
    torch.testing.assert_close(model(x), by_hand(plain, x, place), rtol=0, atol=0)


class Residual(nn.Module):
    """A network with named layers, whose first layer with weights is inside a block."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Identity()
        self.stem = nn.Sequential(nn.Tanh(), nn.Conv2d(1, 2, 3, padding=1))
        self.block = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(72, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.shift(x))
        return self.head((x + self.block(x)).flatten(1))


def stem(model: Residual, x: Tensor, noise: Callable[[Tensor], Tensor]) -> Tensor:
    z = noise(model.stem(x))
    return model.head((z + model.block(z)).flatten(1))


def inner(model: Residual, x: Tensor, noise: Callable[[Tensor], Tensor]) -> Tensor:
    z = model.stem(x)
    return model.head((z + model.block[1](noise(model.block[0](z)))).flatten(1))


@pytest.mark.parametrize(
    ("at", "expected"), [("first", stem), ("stem", stem), ("stem.1", stem), ("block.0", inner)]
)
def test_layers_inside_of_blocks_are_found_by_their_names(
    at: str, expected: Callable[..., Tensor]
) -> None:
    torch.manual_seed(0)
    model, x = Residual(), images()

    def noise(z: Tensor) -> Tensor:
        return z + torch.empty_like(z).normal_(0, 0.3, generator=seeded(7))

    with torch.no_grad():
        wanted = expected(model, x, noise)
        Gaussian(0.3, at=at).install(model, 7)
        assert torch.equal(model(x), wanted)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(
    ("at", "near"), [("blok", "block"), ("block.3", "block.0"), ("Stem", "stem"), ("zzzz", "shift")]
)
def test_an_unknown_name_is_refused_with_names_like_it(at: str, near: str) -> None:
    model = Residual()
    before = list(model.modules())
    with pytest.raises(
        InputError, match=f"^noise.at={at} is not allowed: .*input, first.*"
    ) as refusal:
        Gaussian(at=at).install(model, 0)
    assert near in str(refusal.value).partition("(")[2]
    # The refusal does not change the model.
    assert list(model.modules()) == before
    assert hooks(model) == 0


def test_a_model_without_weights_has_no_first_layer() -> None:
    with pytest.raises(InputError, match=r"^noise.at=first is not allowed"):
        Gaussian(at="first").install(nn.Sequential(nn.Flatten(1)), 0)


def test_places_of_the_same_seed_are_one_layer_each() -> None:
    model = network()
    Gaussian(0.1).install(model, 0)
    layer = layer_of(model)
    Gaussian(0.2, at="first").install(model, 0)
    assert noise_layers(model)[0] is layer
    assert len(noise_layers(model)) == 2
