"""The classifiers of torchvision, untrained."""

import difflib
from dataclasses import dataclass, field

from torch import Tensor, nn

from robusttrain.errors import InputError
from robusttrain.models.normalize import Normalize, check_statistics


class GreyToColour(nn.Module):
    """Repeat the single channel of images (N, 1, H, W) to (N, 3, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1)


@dataclass
class TorchvisionModel:
    """A classifier of `torchvision.models`, without pretrained weights and auxiliary heads.

    Images have three channels, or one, which is repeated to three. The smallest images are 8 x 8
    pixels for efficientnet, mnasnet, mobilenet, regnet, resnet, resnext, shufflenet, swin and
    wide_resnet; 32 x 32 for convnext, densenet, googlenet, squeezenet and vgg; 63 x 63 for alexnet;
    and 75 x 75 for inception_v3. maxvit_t needs multiples of 224 pixels, and vit_* square images of
    whole patches. `build_model` refuses other sizes.

    Defenses that differentiate a gradient cannot use vit_* and mobilenet_v3_*, for which torch
    2.14 has no second derivatives, nor swin_v2_*, whose second derivatives are non-finite.

    Parameters
    ----------
    name
        The name of the classifier in torchvision.
    mean, std
        Normalisation of the images, in pixel units; 1 entry, or one per channel.
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
        # Auxiliary heads make train mode return a tuple; without `init_weights` torchvision warns.
        return {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        # The number of position embeddings depends on the image size.
        return {"image_size": image_size}
    return {}


def _check_name(name: str) -> None:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        close = difflib.get_close_matches(name, known, cutoff=0)
        problem = f"is not a classifier of torchvision.models; near it: {', '.join(close)}"
        raise InputError("name", name, problem=problem)
