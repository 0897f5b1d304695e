"""The trained model of a run, for somebody's own code."""

from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf

from robusttrain.checkpoints import checkpoint as checkpoints
from robusttrain.config.build import build_component
from robusttrain.data import Info
from robusttrain.models.network import network
from robusttrain.runs.trust import TRUSTED, refuse_strangers

# The part of it that a model alone needs, with all that its values may refer to.
INHERITED_BY_MODEL = ("model", "noise", "norm", "eps", "seed", "data_dir")


def load_model(
    run: Path | str, *, trust: Sequence[str] = (), device: torch.device | str = "cpu"
) -> torch.nn.Module:
    """The trained model of a run, in eval mode, taking images (N, C, H, W) in [0, 1] to logits.

    Parameters
    ----------
    run
        A run directory, which stands for its `best.pt`, or a checkpoint file.
    trust
        Packages beside robusttrain whose classes may be built from the saved configuration.
    device
        Where to put it.

    Raises
    ------
    InputError
        If there is no such checkpoint, it is damaged, or it names a class of no trusted package.
    """
    # A command line names such a run by a key of this name, too: attack.source.run.
    saved = checkpoints.load(run, key="run")
    plain = {key: saved.config[key] for key in INHERITED_BY_MODEL}
    refuse_strangers(plain, [*TRUSTED, *trust])
    channels, height, width = saved.image_shape
    info = Info((channels, height, width), saved.num_classes, ())
    # A model that is a network already is initialised as soon as it is built.
    with torch.random.fork_rng(devices=[]):
        parts = build_component(OmegaConf.create(plain))
        model = network(parts["model"], parts["noise"], info, plain["seed"])
    saved.load_into(model, run)
    return model.eval().to(device)
