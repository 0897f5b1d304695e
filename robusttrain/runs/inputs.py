"""Data and model of a run."""

import torch
from torch import nn

from robusttrain.checkpoints.checkpoint import Checkpoint
from robusttrain.checkpoints.external import Foreign, Program, Weights
from robusttrain.config.run_config import Config, Stage
from robusttrain.data import Info, Samples, Streamed
from robusttrain.errors import InputError
from robusttrain.evaluation import model_checks
from robusttrain.models import build_model
from robusttrain.models.network import network
from robusttrain.report.terminal import Terminal
from robusttrain.runs.saved_model import load_model
from robusttrain.runtime import distributed


def loaded(config: Config, name: str, device: torch.device) -> tuple[Samples, Samples]:
    """The training and the test set, of which nothing is left that could be refused."""
    train, test = distributed.in_turns(config.dataset.load)
    for samples in (train, test):
        model_checks.refuse_outside_box(samples, name)
    if Stage.evaluate in config.stages:
        model_checks.refuse_too_many(test, config.evaluation.choose(test.size), device)
    return train, test


def model_of(
    config: Config, info: Info, given: Checkpoint | Foreign | None, terminal: Terminal
) -> nn.Module:
    """The model on the CPU, with its noise, and with what `checkpoint` has given for it."""
    if isinstance(given, Program):
        if Stage.train in config.stages:
            raise InputError(
                f"{given} is a program, which cannot be trained: give stages=[evaluate]"
            )
        model = network(given, config.noise, info, config.seed)
        terminal.say(f"{given} is a program of {given.kind}, which takes the place of model=")
        return model
    model = network(config.model, config.noise, info, config.seed)
    if isinstance(given, Weights):
        terminal.say(given.load_into(model, str(config.checkpoint)))
    elif given is not None:
        given.load_into(model, str(config.checkpoint))
    return model


def other_model(config: Config, info: Info, key: str, run: str) -> nn.Module:
    """The model of the run that the defense's `key` names, for the images and classes of `info`."""
    try:
        model = load_model(run, trust=config.trust)
        return build_model(model, info.num_classes, info.image_shape)
    except InputError as error:
        raise InputError(f"defense.{key}={run}: {error}") from error


def digests(train: Samples, test: Samples, terminal: Terminal) -> dict[str, str]:
    with terminal.progress("looking at the data", train.size + test.size) as bar:
        return {"train": train.digest(bar.advance), "test": test.digest(bar.advance)}


def placed(samples: Samples, device: torch.device | str, name: str, terminal: Terminal) -> Samples:
    """The samples for use on `device`; says so where they are not in memory."""
    with terminal.progress(f"{name} images", samples.size) as bar:
        placed = samples.to(device, bar.advance)
    if isinstance(placed, Streamed) and placed.size:
        size = f"{placed.decoded / 1e9:.3g} GB decoded"
        terminal.say(f"{placed.size} {name} images stay in their files ({size})")
    return placed
