"""Networks of timm and torchvision, small enough for tests."""

from typing import Any

from robusttrain.models import Architecture
from robusttrain.models.timm import TimmModel
from robusttrain.models.torchvision import TorchvisionModel


def small(name: str, **options: Any) -> TimmModel:
    return TimmModel(name, options=options)


# One of each kind, as small as its library makes it.
ARCHITECTURES: dict[str, Architecture] = {
    "vit": small("vit_tiny_patch16_224", embed_dim=16, depth=1, num_heads=2, patch_size=8),
    "deit": small(
        "deit_tiny_distilled_patch16_224", embed_dim=16, depth=1, num_heads=2, patch_size=8
    ),
    "beit": small("beit_base_patch16_224", embed_dim=16, depth=1, num_heads=2, patch_size=8),
    "swin": small(
        "swin_tiny_patch4_window7_224", embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
    ),
    "convnext": small("convnext_atto", depths=[1, 1, 1, 1], dims=[8, 8, 8, 8]),
    "mixer": small("mixer_s32_224", mlp_ratio=[1, 1]),
    "efficientnet": small("test_efficientnet"),
    "mobilenet": small("mobilenetv3_small_050"),
    "resnet": small("test_resnet"),
    "densenet": small("densenet121", growth_rate=4, block_config=[1, 1, 1, 1]),
    "nfnet": small("test_nfnet"),
    "squeezenet": TorchvisionModel("squeezenet1_1"),
}
