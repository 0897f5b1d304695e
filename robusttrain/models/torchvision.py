"""The classifiers of torchvision, untrained."""

import difflib
from dataclasses import dataclass, field

from torch import Tensor, nn

from robusttrain.errors import InputError
from robusttrain.models.normalize import Normalize, check_statistics


class GreyToColour(nn.Module):
    """The one channel of images (N, 1, H, W) as each of three, (N, 3, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1)


@dataclass
class TorchvisionModel:
    """A classifier of `torchvision.models` by its `name`, without pretrained weights.

    Images are grey, and then repeated to three channels, or have three. Auxiliary heads are off.
    From 8 x 8 pixels up: efficientnet, mnasnet, mobilenet, regnet, resnet, resnext, shufflenet,
    swin and wide_resnet. From 32 x 32 up also convnext, densenet, googlenet, squeezenet and vgg;
    alexnet needs 63 x 63, inception_v3 75 x 75, maxvit_t multiples of 224 and vit_* square images
    of whole patches. `build_model` refuses what does not fit. `mean` and `std`, in pixel units,
    have 1 entry or one per channel.

    Defenses that differentiate a gradient cannot use vit_* and mobilenet_v3_*, for which torch
    2.14 has no second derivatives, nor swin_v2_*, whose second derivatives are not finite.
    """

    name: str = "resnet18"
    mean: list[float] = field(default_factory=lambda: [0.5])
    std: list[float] = field(default_factory=lambda: [0.25])

    def __post_init__(self) -> None:
        _check_name(self.name)
        check_statistics(self.mean, self.std)

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        from torchvision import models

        channels, height, _ = image_shape
        if channels not in (1, 3):
            allowed = "torchvision's models take 1 (grey) or 3 (colour)"
            problem = f"cannot take images of {channels} channels"
            raise InputError("name", self.name, allowed, problem)
        options = _options(self.name, height)
        network = models.get_model(self.name, weights=None, num_classes=num_classes, **options)
        front = [Normalize(self.mean, self.std, channels)]
        grey = [GreyToColour()] if channels == 1 else []
        return nn.Sequential(*front, *grey, network)


def _options(name: str, image_size: int) -> dict[str, object]:
    if name in ("googlenet", "inception_v3"):
        # With auxiliary heads, train mode returns a tuple; left unsaid, initialisation warns.
        return {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        # The table of position embeddings has one entry per patch.
        return {"image_size": image_size}
    return {}


def _check_name(name: str) -> None:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        close = difflib.get_close_matches(name, known, cutoff=0)
        problem = f"is not a classifier of torchvision.models; near it: {', '.join(close)}"
        raise InputError("name", name, problem=problem)
