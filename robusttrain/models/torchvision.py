"""The classifiers of torchvision."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from robusttrain.errors import InputError
from robusttrain.models.front import COLOURS, Front, not_downloaded

# Without weights of torchvision, whose networks learn their scale.
USUAL = [0.5], [0.25]

# Networks with auxiliary heads for training, which are left out, and the beginnings of their names.
WITH_AUXILIARY, AUXILIARY = ("googlenet", "inception_v3"), ("aux1.", "aux2.", "AuxLogits.")

# With the weights of torchvision, these convert ImageNet's normalisation to this one inside.
CONVERTED = [0.5], [0.5]


@dataclass
class TorchvisionModel(Front):
    """A classifier of `torchvision.models`, without auxiliary heads.

    Images have three channels, or one, which is repeated to three. The smallest images are 8 x 8
    pixels for efficientnet, mnasnet, mobilenet, regnet, resnet, resnext, shufflenet, swin and
    wide_resnet; 32 x 32 for convnext, densenet, googlenet, squeezenet and vgg; 63 x 63 for alexnet;
    and 75 x 75 for inception_v3. maxvit_t needs multiples of 224 pixels, and vit_* square images of
    whole patches. `build_model` refuses other sizes, unless `image_size` is set.

    `model.weights=default` are torchvision's own weights, with the normalisation that they were
    trained with. Otherwise the network is new, and the normalisation is 0.5 and 0.25.

    Defenses that differentiate a gradient cannot use vit_* and mobilenet_v3_*, for which torch
    2.14 has no second derivatives, nor swin_v2_*, whose second derivatives are non-finite.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name(self.name)

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        from torchvision import models

        if image_shape[0] not in (1, COLOURS):
            allowed = "torchvision's models take 1 (grey) or 3 (colour)"
            problem = f"cannot take images of {image_shape[0]} channels"
            raise InputError("name", self.name, allowed, problem)
        options = _options(self.name, self.sides(image_shape)[0])
        network = models.get_model(self.name, weights=None, num_classes=num_classes, **options)
        return self.behind(network, image_shape, COLOURS, USUAL)

    def usual_size(self) -> int:
        """The side of the images that torchvision trained the network with."""
        from torchvision import models

        size = models.get_model_weights(self.name).DEFAULT.transforms().crop_size
        return int(size[0])

    def pretrained(self, image_shape: tuple[int, int, int]) -> Mapping[str, Tensor]:
        """The weights that torchvision calls DEFAULT, with their normalisation.

        Raises
        ------
        InputError
            If they cannot be downloaded, or are for another size of images.
        """
        from torchvision import models

        weights = models.get_model_weights(self.name).DEFAULT
        size = weights.meta["min_size"]
        # Of all networks these alone have weights for one size.
        if self.name.startswith("vit_") and self.sides(image_shape) != tuple(size):
            problem = f"of {self.name} are for images of {size[0]} x {size[1]} pixels"
            raise InputError("weights", "default", f"give model.image_size={size[0]}", problem)
        try:
            network = models.get_model(self.name, weights=weights)
        # A download may end with any error, and so may a file that it has left damaged.
        except Exception as error:
            raise not_downloaded("torchvision", self.name, error) from error
        preset = weights.transforms()
        usual = CONVERTED if self.name in WITH_AUXILIARY else (preset.mean, preset.std)
        state = self.behind(network, image_shape, COLOURS, usual).state_dict()
        return {k: t for k, t in state.items() if not k.partition(".")[2].startswith(AUXILIARY)}


def _options(name: str, image_size: int) -> dict[str, object]:
    if name in WITH_AUXILIARY:
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
