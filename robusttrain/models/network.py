"""Build a network with its noise for a data set."""

import torch

from robusttrain import seeding
from robusttrain.data import Info
from robusttrain.models import Architecture, build_model, dry_run
from robusttrain.noise import Noise
from robusttrain.noise.control import drawing_from


def network(architecture: Architecture, noise: Noise, info: Info, seed: int) -> torch.nn.Module:
    """A newly initialised model for the images of `info`, with its noise, on the CPU.

    Raises
    ------
    InputError
        If the architecture cannot take such images, or has no layer for the noise.
    """
    # Initialisation is the only consumer of torch's global stream.
    torch.manual_seed(seeding.derived_seed(seed, "initialisation"))
    model = build_model(architecture, info.num_classes, info.image_shape)
    noise.install(model, seeding.derived_seed(seed, "noise"))
    # Noise with a parameter per activation takes its shape from the first forward pass.
    with drawing_from(model, seed):
        dry_run(model, info.image_shape)
    return model
