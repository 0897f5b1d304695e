"""Build a network with its noise for a data set."""

from collections.abc import Callable

import torch

from robusttrain import seeding
from robusttrain.data import Info
from robusttrain.errors import InputError
from robusttrain.models import Architecture, build_model, dry_run
from robusttrain.models.protected_input import protect_input
from robusttrain.noise import Noise
from robusttrain.noise.control import unreached
from robusttrain.noise.layer import noise_layers


def network(
    architecture: Architecture | torch.nn.Module,
    noise: Noise,
    info: Info,
    seed: int,
    initialise: Callable[[torch.nn.Module], None] | None = None,
) -> torch.nn.Module:
    """A model for the images of `info`, with its noise, on the CPU.

    It is newly initialised. `initialise` may then load other weights, before noise is added, which
    may take its scale from them.

    Raises
    ------
    InputError
        If the architecture cannot take such images or has no layer for the noise, or if its
        predictions do not use any layer that has noise.
    """
    # Initialisation is the only consumer of torch's global stream.
    torch.manual_seed(seeding.derived_seed(seed, "initialisation"))
    model = build_model(architecture, info.num_classes, info.image_shape)
    if initialise is not None:
        initialise(model)
    noise.install(model, seeding.derived_seed(seed, "noise"))
    # Noise with a parameter per activation takes its shape from the first forward pass.
    places = places_without_noise(model, info.image_shape)
    if places and len(places) == len(noise_layers(model)):
        problem = f"has no effect in {listed(places)}, which the predictions do not use"
        raise InputError("noise", allowed="choose another place or mechanism", problem=problem)
    # Once more, since a noise may write to the images.
    protect_input(model, info.image_shape)
    return model


def places_without_noise(model: torch.nn.Module, image_shape: tuple[int, int, int]) -> list[str]:
    """Paths of the layers and tensors of `model` that have noise but no effect on its predictions.

    For example, torch's attention uses the weights of its output layer without calling the layer,
    so that noise on the activations there has no effect.
    """
    return unreached(model, lambda: dry_run(model, image_shape))


def listed(places: list[str]) -> str:
    """The first three paths as text, and the number of the others."""
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return ", ".join(places[:3]) + more
