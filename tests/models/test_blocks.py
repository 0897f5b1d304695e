"""The blocks of networks, against the depths that their papers state."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision import models

from robusttrain.models.blocks import blocks_of, innermost, plain_name
from robusttrain.models.preact_resnet import PreActResNet
from robusttrain.models.small_cnn import SmallCNN
from robusttrain.noise.pni import PNIWeights

# The stem, what the paper calls blocks, patch merging or downsampling, the last layers, the head.
DEPTHS = {
    "resnet18": 1 + 8 + 1,
    "resnet50": 1 + 16 + 1,
    "vit_b_16": 1 + 12 + 1,
    "convnext_tiny": 1 + (3 + 3 + 9 + 3) + 3 + 1,
    "swin_t": 1 + (2 + 2 + 6 + 2) + 3 + 1,
    "efficientnet_b0": 1 + (1 + 2 + 2 + 3 + 3 + 4 + 1) + 1 + 1,
    "mobilenet_v2": 1 + 17 + 1 + 1,
    "densenet121": 1 + (6 + 12 + 24 + 16) + 3 + 1,
    "vgg11_bn": 8 + 2 + 1,
}


def stored(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("name", DEPTHS)
def test_blocks_are_those_of_the_papers(name: str) -> None:
    with torch.device("meta"):
        model = models.get_model(name, num_classes=7)
    blocks = blocks_of(model, 7)
    assert len(blocks) == DEPTHS[name]
    # Each parameter is in one block.
    assert sorted(name for block in blocks for name in block) == sorted(stored(model))


def test_tokens_and_position_embeddings_are_in_the_first_block_of_a_transformer() -> None:
    with torch.device("meta"):
        first, *_, last, head = blocks_of(models.get_model("vit_b_16", num_classes=7), 7)
    assert first == [
        "class_token", "encoder.pos_embedding", "conv_proj.weight", "conv_proj.bias"
    ]  # fmt: skip
    assert last[-2:] == ["encoder.ln.weight", "encoder.ln.bias"]
    assert head == ["heads.head.weight", "heads.head.bias"]


def test_our_networks_have_a_block_for_each_layer_or_residual_block() -> None:
    plain = SmallCNN(2).build(3, (1, 8, 8))
    assert [block[0] for block in blocks_of(plain, 3)] == [
        "0.weight", "2.weight", "5.weight", "7.weight"
    ]  # fmt: skip
    residual = PreActResNet([1, 2], width=2).build(3, (1, 8, 8))
    assert len(blocks_of(residual, 3)) == 1 + 3 + 1


class Own(nn.Module):
    """A network whose layers are in no list, with a norm before all weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.first = nn.Conv2d(1, 2, 3)
        self.second = weight_norm(nn.Linear(8, 4))
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(4, 3)


BLOCKS = [
    ["scale", "norm.weight", "norm.bias", "first.weight", "first.bias"],
    [
        "second.bias",
        "second.parametrizations.weight.original0",
        "second.parametrizations.weight.original1",
    ],
    ["head.weight", "head.bias"],
]


def test_a_wrapper_is_no_block_and_noise_is_in_none() -> None:
    assert blocks_of(Own(), 3) == BLOCKS
    wrapped = nn.Sequential(nn.Identity(), nn.ModuleDict({"inner": Own()}))
    assert blocks_of(wrapped, 3) == [[f"1.inner.{name}" for name in block] for block in BLOCKS]
    assert innermost(wrapped, stored(wrapped))[1] == "1.inner."
    noisy = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 3))
    PNIWeights().install(noisy, 0)
    blocks = [[plain_name(name) for name in block] for block in blocks_of(noisy, 3)]
    assert [sorted(block) for block in blocks] == [["1.bias", "1.weight"], ["2.bias", "2.weight"]]


def test_a_network_without_a_head_has_its_layers_as_blocks() -> None:
    assert blocks_of(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 6)), 3) == [
        ["0.weight", "0.bias"], ["1.weight", "1.bias"]
    ]  # fmt: skip
    assert blocks_of(nn.LayerNorm(4), 3) == [["weight", "bias"]]
