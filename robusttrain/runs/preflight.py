"""What is refused, or warned of, before any work."""

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from robusttrain import ranges
from robusttrain.checkpoints.checkpoint import Checkpoint
from robusttrain.checkpoints.external import Foreign
from robusttrain.config.run_config import Config, Stage
from robusttrain.data import Info, Samples
from robusttrain.evaluation import model_checks
from robusttrain.evaluation.certification import certifiable
from robusttrain.evaluation.voting import least_votes
from robusttrain.intervals import refuse_unbounded
from robusttrain.noise.layer import noise_layers
from robusttrain.noise.placement import INPUT
from robusttrain.report.terminal import Terminal


def check_evaluation(
    config: Config,
    model: nn.Module,
    info: Info,
    given: Checkpoint | Foreign | None,
    terminal: Terminal,
) -> None:
    """Refuse votes that decide nothing, and certificates and proofs that do not exist.

    Where certificates are asked for, warn if the model was not trained for them.
    """
    if Stage.evaluate not in config.stages:
        return
    ranges.at_least(least_votes(model), **{"evaluation.votes": config.evaluation.votes})
    if config.evaluation.verify:
        refuse_unbounded(model, info.image_shape, config.norm, "evaluation.verify=true")
    if config.evaluation.certification is None:
        return
    sigma = certifiable(model).sigma
    trained = _noise_of_training(config, model, given)
    if trained != f"sigma {sigma:g}":
        terminal.say(
            f"warning: certifying with sigma {sigma:g} a model that was trained with {trained}: "
            f"few images can be certified where it has not seen such noise"
        )


def _noise_of_training(config: Config, model: nn.Module, given: Checkpoint | Foreign | None) -> str:
    """The size of the noise at the input that the model has learnt from, or will, in words."""
    if isinstance(given, Foreign):
        return "noise that nobody has told"
    if Stage.train in config.stages:
        seen = noise_layers(model)[0].on_train
        return f"sigma {certifiable(model).sigma:g}" if seen else "no noise"
    assert given is not None
    noise: Any = OmegaConf.to_container(OmegaConf.create(given.config).noise, resolve=True)
    mechanisms = noise.get("mechanisms", {"": noise}).values()
    sigmas = [m["sigma"] for m in mechanisms if m.get("train") and m.get("at") == INPUT]
    return f"sigma {sigmas[0]:g}" if sigmas else "no noise"


def inspect_model(
    config: Config,
    names: Mapping[str, str],
    model: nn.Module,
    is_foreign: bool,
    test: Samples,
    terminal: Terminal,
) -> None:
    """Say what makes the figures of an evaluation mean something else than they seem to."""
    x, y = model_checks.sample(test, config.evaluation.choose(test.size))
    model_checks.refuse_without_gradient(model, x, names["model"])
    for finding in model_checks.inspect(model, x, y, foreign=is_foreign):
        if finding.message:
            terminal.say(f"warning: {finding.message}")
