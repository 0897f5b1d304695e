"""The features of a network: what enters its head, and which networks have none."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from robusttrain.errors import InputError
from robusttrain.models.features import Features, heads_of


def features(model: nn.Module, x: Tensor, classes: int) -> Tensor:
    found: Tensor = Features(model, heads_of(model, classes))(x)
    return found


@pytest.mark.parametrize("wrap", [lambda head: head, weight_norm], ids=["plain", "weight norm"])
def test_they_are_what_enters_the_head(wrap) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), wrap(nn.Linear(8, 3)))
    x = torch.rand(5, 1, 3, 3)
    found = features(model, x, 3)
    assert torch.equal(found, model[:3](x))
    assert torch.equal(model[3](found), model(x))
    assert not model[3]._forward_pre_hooks


def test_maps_of_a_head_that_is_a_convolution_become_rows() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Conv2d(2, 3, 1), nn.AdaptiveAvgPool2d(1))
    x = torch.rand(5, 1, 3, 3)
    assert torch.equal(features(model, x, 3), model[0](x).flatten(1))


def test_two_heads_have_the_features_of_both() -> None:
    small = {"patch_size": 16, "embed_dim": 8, "depth": 1, "num_heads": 2, "img_size": 32}
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=6, **small).eval()
    x = torch.rand(2, 3, 32, 32)
    found = features(model, x, 6)
    assert found.shape == (2, 16)
    logits = (model.head(found[:, :8]) + model.head_dist(found[:, 8:])) / 2
    torch.testing.assert_close(logits, model(x))


class HeadOfItsOwn(nn.Module):
    """A network whose head is a parameter beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.zeros(3, 4))


class Uncalled(nn.Module):
    """A network that uses the weights of its head without a call."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x) @ self.head.weight.T


@pytest.mark.parametrize("model", [HeadOfItsOwn(), nn.Linear(4, 5)], ids=["larger", "none"])
def test_a_network_without_a_head_of_its_own_has_none(model: nn.Module) -> None:
    with pytest.raises(InputError, match=r"has no features: no layer of its own has 3 outputs"):
        heads_of(model, 3)


def test_a_head_that_is_never_called_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="its head is never called"):
        features(Uncalled(), torch.rand(2, 4), 3)
