"""Noise on weights: which tensors of a model are weights, and how noise is added to them."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import (
    ParametrizationList,
    is_parametrized,
    register_parametrization,
)
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from robusttrain.errors import InputError
from robusttrain.noise.layer import NoiseLayer, Switches, standard_normal, untraced

# Recurrent layers pass copies of their weights to their kernels; those of programs are fixed.
OPAQUE = (nn.RNNBase, torch.jit.ScriptModule)


class Weight(NamedTuple):
    """The attribute `name` of `module`, a tensor that a model computes with, after normalisation.

    `path` is its full name in the model.
    """

    module: nn.Module
    name: str
    path: str

    def clean(self) -> Tensor:
        """The tensor without noise, differentiable; leaves statistics of normalisation alone."""
        hook = _normalisation(self.module, self.name)
        if isinstance(hook, SpectralNorm):
            return hook.compute_weight(self.module, do_power_iteration=False)
        if hook is not None:
            clean: Tensor = hook.compute_weight(self.module)
            return clean
        if is_parametrized(self.module, self.name):
            steps = cast(nn.ModuleDict, self.module.parametrizations)[self.name]
            return _parametrized(cast(ParametrizationList, steps))
        return self.module.get_parameter(self.name)


def weights_for(noise: str, model: nn.Module) -> list[Weight]:
    """The weights of `model`, tensors of two or more axes, in the order of registration.

    If a tensor is normalised (weight norm, spectral norm, parametrizations), the weight is the
    normalised one. Tensors of one axis, such as biases and scales of normalisation, are not
    weights.

    Raises
    ------
    InputError
        If there are none, or if noise cannot be added to some; the message names the `noise`.
    """
    found = []
    for path, module in _layers(model):
        kind = _opaque(module)
        if kind and any(p.dim() > 1 for p in module.parameters()):
            problem = f"cannot reach the weights of {kind} ({path or 'the model'})"
            raise InputError("noise", noise, "choose noise in inputs or activations", problem)
        weights = [Weight(module, name, f"{path}.{name}".lstrip(".")) for name in _names(module)]
        with torch.no_grad():
            found += [weight for weight in weights if weight.clean().dim() > 1]
    if not found:
        raise InputError("noise", noise, "the model has none", "needs a layer with weights")
    return found


class WeightNoise(NoiseLayer):
    """Noise on the tensor `target`, with one draw for each pass of the model.

    The draw is kept during the pass, since a layer may read its weight several times. How often it
    does depends on modes and gradients.
    """

    def __init__(self, switches: Switches, target: Weight, seed: int) -> None:
        super().__init__(switches, seed)
        # In a tuple, so that the module is not registered as a submodule of its own part.
        self.target = target
        self.place = target.path
        self.in_pass = False
        self._draw: Tensor | None = None

    @untraced
    def forward(self, x: Tensor) -> Tensor:
        return self.perturb(x) if self.active else x

    @untraced
    def onto_normalised(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """A forward pre-hook of the target's module, after the hook that sets the weight."""
        setattr(module, self.target.name, self(getattr(module, self.target.name)))

    def standard_normal(self, weight: Tensor) -> Tensor:
        """N(0, 1) in the shape of `weight`, as a constant for gradients."""
        if self._draw is not None:
            return self._draw
        draw = self.drawn(weight, standard_normal, shared=True)
        self._draw = draw if self.in_pass else None
        return draw


def put_on_weights(model: nn.Module, layers: Sequence[WeightNoise]) -> None:
    """Register each of `layers` at its weight in `model`."""
    for layer in layers:
        module, name, _ = layer.target
        layer.train(module.training)
        if _normalisation(module, name) is None:
            register_parametrization(module, name, layer)
        else:
            names = (f"{name}_noise_{number}" for number in count())
            module.add_module(next(free for free in names if not hasattr(module, free)), layer)
            module.register_forward_pre_hook(layer.onto_normalised)
    passes = _Pass(layers)
    model.register_forward_pre_hook(passes.begin)
    model.register_forward_hook(passes.end, always_call=True)


class _Pass:
    """Hooks that mark the start and the end of a pass of the model for its noise layers."""

    def __init__(self, layers: Sequence[WeightNoise]) -> None:
        self.layers = layers

    @untraced
    def begin(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        for layer in self.layers:
            layer.in_pass = True

    @untraced
    def end(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        for layer in self.layers:
            layer.in_pass, layer._draw = False, None


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules of `model` with their paths, except those inside opaque modules and noise."""
    hidden: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module in hidden:
            continue
        covered = isinstance(module, NoiseLayer | ParametrizationList)
        if covered or _opaque(module):
            hidden.update(module.modules())
        if not covered:
            yield path, module


def _opaque(module: nn.Module) -> str:
    """The kind of `module` if noise cannot be added to its weights, otherwise an empty string.

    A module can declare its kind by an attribute `opaque_to_noise`.
    """
    kind: str = getattr(module, "original_name", type(module).__name__)
    own: str = getattr(module, "opaque_to_noise", "")
    return own or (kind if isinstance(module, OPAQUE) else "")


def _names(module: nn.Module) -> list[str]:
    """The attributes of `module` that hold the tensors it computes with."""
    hooks = _normalisations(module)
    made_of = {f"{hook.name}_{part}" for hook in hooks for part in ("g", "v", "orig")}
    own = [name for name, _ in module.named_parameters(recurse=False) if name not in made_of]
    parametrized: Iterable[str] = ()
    if is_parametrized(module):
        parametrized = cast(nn.ModuleDict, module.parametrizations)
    return [*own, *parametrized, *(hook.name for hook in hooks)]


def _normalisations(module: nn.Module) -> list[WeightNorm | SpectralNorm]:
    """The hooks of torch's older normalisations, which set weights of `module` before each pass."""
    hooks = module._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, WeightNorm | SpectralNorm)]


def _normalisation(module: nn.Module, name: str) -> WeightNorm | SpectralNorm | None:
    return next((hook for hook in _normalisations(module) if hook.name == name), None)


def _parametrized(steps: ParametrizationList) -> Tensor:
    """The original tensors after all parametrizations except noise, in eval mode."""
    names = ["original"] if steps.is_tensor else [f"original{n}" for n in range(steps.ntensors)]
    values: list[Tensor] = [getattr(steps, name) for name in names]
    for step in steps:
        if not isinstance(step, NoiseLayer):
            training = step.training
            values = [step.eval()(*values)]
            step.train(training)
    return values[0]
