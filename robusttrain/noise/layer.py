"""The base of noise layers, and functions on all noise layers of a model."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from robusttrain import ranges

_Method = TypeVar("_Method", bound=Callable[..., Any])


def untraced(method: _Method) -> _Method:
    """`torch.compiler.disable` for a method, since torch.compile cannot trace generators.

    It is applied at the first call: it imports Dynamo, which takes as long as torch itself.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(method)
    def call(*given: Any, **named: Any) -> Any:
        if not disabled:
            disabled.append(torch.compiler.disable(method))  # type: ignore[no-untyped-call]
        return disabled[0](*given, **named)

    return cast(_Method, call)


Sampler = Callable[[Tensor, torch.Generator], Tensor]
"""(tensor to fill, generator) -> that tensor with noise."""


class Vote(StrEnum):
    """The prediction of a randomised model: the class of largest mean softmax, or of most draws."""

    mean = "mean"
    majority = "majority"


class Progress(NamedTuple):
    """Progress of training: the epoch, from 1 on, and the number of training images."""

    epoch: int
    images: int


@dataclass(kw_only=True)
class Switches:
    """Base of the mechanisms: when noise is drawn, and how draws are combined to a prediction.

    Parameters
    ----------
    train, predict
        Whether noise is active in training and in prediction. With `predict`, an evaluation attacks
        the expectation over draws, and measures accuracy on new draws.
    vote
        The prediction rule: the largest mean softmax over the draws, or the majority of them.
    """

    train: bool = True
    predict: bool = True
    vote: Vote = Vote.mean

    def __post_init__(self) -> None:
        ranges.one_of(list(Vote), vote=self.vote)
        self.vote = Vote(self.vote)

    def refuse_without_effect(self) -> None:
        """Raise `InputError` if the noise is never drawn."""
        allowed = "true, or combined with predict=true; without noise, noise=none"
        ranges.require(self.train or self.predict, "train", False, allowed)

    def unused(self) -> dict[str, str]:
        """The fields without effect, each with the field that is the cause."""
        return {} if self.predict else {"vote": "predict"}


class NoiseLayer(nn.Module):
    """A source of noise with its own generator, and a switch for training and for prediction.

    As a layer of a container it is the identity; hooks call `perturb`. Crafting in eval mode does
    not change the mode of noise layers: an attack during training faces the noise of training, and
    one during evaluation the noise of prediction. Its parameters have no weight decay.

    Parameters
    ----------
    switches
        When noise is drawn.
    seed
        Seed of the layer's random stream.
    """

    # Significance level that a majority vote needs to be a prediction; None accepts every vote.
    alpha: float | None = None

    # The path of the layer or the tensor where it acts; empty for the input.
    place = ""

    # Number of draws that a training step averages over, the same for attack and outer loss.
    draws: int | None = None

    def __init__(self, switches: Switches, seed: int) -> None:
        super().__init__()
        self.on_train = switches.train
        self.on_predict = switches.predict
        self.vote = switches.vote
        self.seed = seed
        self.held: int | None = None
        self._generators: dict[str, torch.Generator] = {}

    def forward(self, x: Tensor) -> Tensor:
        return x

    def perturb(self, x: Tensor) -> Tensor:
        """Add noise to activations `x` (N, ...), in any mode."""
        raise NotImplementedError

    def penalty(self, progress: Progress) -> Tensor | None:
        """A scalar that training adds to the loss; None if the mechanism has no penalty."""
        return None

    @untraced
    def before(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A forward pre-hook that adds noise to the first argument."""
        if not self.active:
            return arguments
        x, *others = arguments
        return (self.perturb(x), *others)

    @untraced
    def after(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook that adds noise to the output."""
        return self.perturb(output) if self.active else output

    @property
    def active(self) -> bool:
        """Whether noise is drawn in the current mode."""
        return self.on_train if self.training else self.on_predict

    def drawn(self, like: Tensor, sample: Sampler, *, shared: bool = False) -> Tensor:
        """Noise in the shape of `like`, as a constant for gradients.

        If the layer is held, the noise is the same for every image and every pass. `shared` means
        that `like` has no axis of images.
        """
        if self.held is None:
            return sample(_memory(like), self.generator(like.device)).to(like.dtype)
        again = torch.Generator(like.device).manual_seed(self.held)
        one = like if shared else like[:1]
        return sample(_memory(one), again).to(like.dtype).expand_as(like)

    def generator(self, device: torch.device) -> torch.Generator:
        """The layer's random stream on `device`."""
        key = str(device)
        if key not in self._generators:
            self._generators[key] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[key]

    def restart(self, seed: int) -> None:
        """Restart the streams from `seed`."""
        self.seed, self._generators = seed, {}

    def rng_state_dict(self) -> dict[str, Tensor]:
        """The state of each stream in use, by device."""
        return {key: generator.get_state() for key, generator in self._generators.items()}

    def load_rng_state_dict(self, states: Mapping[str, Tensor]) -> None:
        """Continue the streams from `states`, the result of `rng_state_dict`."""
        # Streams without a state had not started yet.
        self._generators = {}
        for device, state in states.items():
            self.generator(torch.device(device)).set_state(state)


def attach(model: nn.Module, layer: NoiseLayer, place: nn.Module | None = None) -> None:
    """Make `layer` a part of `model`, so that it moves, is saved and changes mode with it.

    `place` is the layer of the model on whose activations it acts, or None for the model itself.
    """
    layer.train(model.training)
    layer.place = next((path for path, module in model.named_modules() if module is place), "")
    names = (f"noise_{number}" for number in count())
    model.add_module(next(name for name in names if not hasattr(model, name)), layer)


def _memory(like: Tensor) -> Tensor:
    # Contiguous, so that the order of draws does not depend on the layout, and filling is faster.
    # At least float32, since noise that is made of uniform numbers in bf16 has no tails.
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def standard_normal(memory: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, 1)."""
    return memory.normal_(generator=generator)


def standard_laplace(memory: Tensor, generator: torch.Generator) -> Tensor:
    """Laplace noise of scale 1, whose absolute value is exponential.

    It is made of uniform numbers, which on a CPU takes a fraction of the time of `exponential_`.
    """
    memory.uniform_(-1, 1, generator=generator)
    # A draw may be rounded to -1, for which the logarithm would be infinite.
    sizes = memory.abs().clamp_max_(1 - torch.finfo(memory.dtype).eps).neg_().log1p_().neg_()
    return torch.copysign(sizes, memory, out=memory)


def noise_layers(model: nn.Module) -> list[NoiseLayer]:
    """All noise layers of `model`."""
    return [module for module in model.modules() if isinstance(module, NoiseLayer)]


def predicts_randomly(model: nn.Module) -> bool:
    """Whether the predictions of `model` depend on noise that is drawn in eval mode."""
    return any(layer.on_predict and layer.held is None for layer in noise_layers(model))


def penalty(model: nn.Module, progress: Progress) -> Tensor | None:
    """The sum of the mechanisms' penalties, a scalar; None if there are none."""
    found = [layer.penalty(progress) for layer in noise_layers(model) if layer.on_train]
    terms = [term for term in found if term is not None]
    return torch.stack(terms).sum() if terms else None
