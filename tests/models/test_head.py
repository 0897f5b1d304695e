"""The head of a network: the parameters that its logits come from last."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations

from robusttrain.models.head import head_of


class HeadOfItsOwn(nn.Module):
    """A network whose head is a parameter of its own, beside others."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(1, 4))
        self.weight = nn.Parameter(torch.zeros(3, 4))


@pytest.mark.parametrize("normed", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_tensors_that_a_head_is_computed_from_are_of_the_head(normed) -> None:
    model = nn.Sequential(nn.Linear(4, 4), normed(nn.Linear(4, 3)))
    last = {name for name, _ in model.named_parameters() if name.startswith("1.")}
    assert set(head_of(model, 3)) == last


def test_the_last_layer_with_a_row_per_class_is_the_head() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 3), nn.LayerNorm(3))
    assert head_of(model, 3) == ["2.weight", "2.bias"]


def test_a_head_of_the_network_itself_is_without_its_other_parameters() -> None:
    assert head_of(HeadOfItsOwn(), 3) == ["weight"]


def test_a_network_without_a_row_per_class_has_no_head() -> None:
    assert head_of(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()), 3) == []


def test_a_network_of_timm_names_its_head_wherever_it_is() -> None:
    small = {"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 32}
    network = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=16, **small)
    names = [f"1.{n}" for n in ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")]
    assert head_of(nn.Sequential(nn.Identity(), network), 16) == names
