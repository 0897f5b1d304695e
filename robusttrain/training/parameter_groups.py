"""The parameters that an optimiser changes, in groups of equal learning rate and weight decay."""

from typing import Any

from torch import nn

from robusttrain.models.blocks import blocks_of, noise_parameters, norm_parameters, weights_of
from robusttrain.optim.optimizers import Grouped, Optimizer


def parameter_groups(
    model: nn.Module, settings: Optimizer, num_classes: int
) -> list[dict[str, Any]]:
    """The parameters of `model` that need a gradient, in groups; the highest learning rate first.

    Those of noise have the peak rate and no weight decay, which would silence the noise.
    """
    of_noise = noise_parameters(model)
    grouped = settings if isinstance(settings, Grouped) else Grouped()
    factors = _factors(model, grouped.layer_decay, num_classes)
    plain = set() if grouped.decay_norms_and_biases else _norms_and_biases(model)
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_noise = id(parameter) in of_noise
            decays = not is_noise and id(parameter) not in plain
            key = (is_noise, -factors.get(name, 1.0), not decays)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": groups[is_noise, rate, undecayed],
            **({"lr": -rate * settings.lr} if rate != -1 else {}),
            **({"weight_decay": 0.0} if undecayed else {}),
        }
        for is_noise, rate, undecayed in sorted(groups)
    ]


def trained_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights of `model` that need a gradient, without those of noise."""
    of_noise = noise_parameters(model)
    return [p for p in weights_of(model) if p.requires_grad and id(p) not in of_noise]


def _factors(model: nn.Module, decay: float, num_classes: int) -> dict[str, float]:
    """The factor of the learning rate of each parameter in a block, by its name."""
    if decay == 1:
        return {}
    from_head = reversed(blocks_of(model, num_classes))
    return {name: decay**depth for depth, block in enumerate(from_head) for name in block}


def _norms_and_biases(model: nn.Module) -> set[int]:
    """The identities of parameters of normalisation layers, and of tensors of up to one axis."""
    return norm_parameters(model) | {id(p) for p in model.parameters() if p.dim() <= 1}
