"""Load the trained model of a run, for use in other programs."""

from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf

from robusttrain.checkpoints import external
from robusttrain.checkpoints.checkpoint import Checkpoint, refuse_incomplete
from robusttrain.checkpoints.external import ExportedProgram, Weights
from robusttrain.checkpoints.pretrained import PREFIX
from robusttrain.config.build import build_model_section
from robusttrain.data import Info
from robusttrain.errors import InputError
from robusttrain.models.network import network
from robusttrain.runs.trust import refuse_untrusted

# The keys of a saved configuration that its model needs, and those that their values refer to.
INHERITED_BY_MODEL = ("model", "noise", "norm", "eps", "seed", "data_dir")


def load_model(
    run: Path | str, *, trust: Sequence[str] = (), device: torch.device | str = "cpu"
) -> torch.nn.Module:
    """The trained model of a run, in eval mode, taking images (N, C, H, W) in [0, 1] to logits.

    Parameters
    ----------
    run
        A run directory, which stands for its `best.pt`, a checkpoint file, a program (TorchScript,
        torch.export), whose code is run, or `pretrained:NAME`.
    trust
        Packages other than robusttrain whose classes and functions the saved configuration may
        call, and `code` if a program may run its own.
    device
        The device of the returned model.

    Raises
    ------
    InputError
        If the checkpoint is missing or damaged, is a state dict without its network, or names a
        class or function that is not trusted; or if it is a program, without `code` in `trust`.
    """
    # `run` is also the key on a command line: attack.source.run.
    saved = external.load(run, trust, key="run")
    if isinstance(saved, Weights):
        allowed = "a run, a checkpoint of one, or a program (TorchScript, torch.export)"
        raise InputError("run", run, allowed, "is a state dict, without a network")
    if isinstance(saved, ExportedProgram):
        return saved.loaded().to(device)
    return restored(saved, run, trust).to(device)


def restored(saved: Checkpoint, run: Path | str, trust: Sequence[str]) -> torch.nn.Module:
    """The model of a checkpoint, in eval mode, on the CPU; see `load_model`."""
    refuse_incomplete(saved, INHERITED_BY_MODEL, run, key="run")
    try:
        model = _model_of(saved, trust)
        saved.load_into(model, run)
    except InputError as error:
        # Keys in the other run mean nothing in this one.
        raise InputError("run", run, str(error), "cannot be loaded") from error
    return model.eval()


def load_pretrained(name: str, *, device: torch.device | str = "cpu") -> torch.nn.Module:
    """A reference model, in eval mode, taking images (N, C, H, W) in [0, 1] to logits.

    These models come with the package, and nothing is downloaded.

    Parameters
    ----------
    name
        Its name, such as `digits-linf-0.1`.
    device
        The device of the returned model.

    Raises
    ------
    InputError
        If there is no such model; the message has all names.

    Examples
    --------
    >>> model = load_pretrained("digits-linf-0.1")
    >>> model(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    return load_model(f"{PREFIX}{name}", device=device)


def _model_of(saved: Checkpoint, trust: Sequence[str]) -> torch.nn.Module:
    plain = {key: saved.config[key] for key in INHERITED_BY_MODEL}
    refuse_untrusted(plain, trust)
    channels, height, width = saved.image_shape
    info = Info((channels, height, width), saved.num_classes, ())
    # A model that is already an `nn.Module` is initialised when it is built.
    with torch.random.fork_rng(devices=[]):
        parts = build_model_section(OmegaConf.create({**plain, "trust": list(trust)}))
        return network(parts["model"], parts["noise"], info, plain["seed"])
