"""A layer of noise, and what mechanisms and training ask of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from robusttrain import ranges

_Method = TypeVar("_Method", bound=Callable[..., Any])


# Generators are no part of a graph that torch.compile traces.
untraced = cast(Callable[[_Method], _Method], torch.compiler.disable)


Sampler = Callable[[Tensor, torch.Generator], Tensor]
"""(memory to fill, stream) -> the noise in it."""


class Vote(StrEnum):
    """What a randomised model predicts: the class of largest mean softmax, or of most draws."""

    mean = "mean"
    majority = "majority"


class Progress(NamedTuple):
    """Where training is: the epoch, from 1 on, and how many images it trains on."""

    epoch: int
    images: int


@dataclass(kw_only=True)
class Switches:
    """Base of the mechanisms: when noise is drawn, and how the draws are counted.

    Parameters
    ----------
    train, predict
        Whether training and prediction see the noise. With `predict`, evaluation attacks the
        expectation over draws and scores on fresh ones.
    vote
        The prediction rule: the largest mean softmax over the draws, or the majority of them.
    """

    train: bool = True
    predict: bool = True
    vote: Vote = Vote.mean

    def __post_init__(self) -> None:
        ranges.one_of(list(Vote), vote=self.vote)
        self.vote = Vote(self.vote)


class NoiseLayer(nn.Module):
    """A source of randomness with a generator of its own and a switch for each phase.

    As a layer of a container it is the identity; hooks call `perturb`. Crafting in eval mode leaves
    noise layers in the mode that they are in: an attack during training faces the noise of
    training, one during evaluation that of prediction. Its parameters see no weight decay.

    Parameters
    ----------
    switches
        When it draws.
    seed
        Start of the layer's random stream.
    """

    # Where a vote that could be luck with this probability is no prediction; None where all count.
    alpha: float | None = None

    # The path of the layer or the tensor where it acts; empty for the images themselves.
    place = ""

    # How many draws of it a step of training averages over, the same for attack and descent.
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
        """Activations `x` (N, ...) with noise, in any mode."""
        raise NotImplementedError

    def penalty(self, progress: Progress) -> Tensor | None:
        """A scalar that training adds to the loss, if the mechanism has one."""
        return None

    @untraced
    def before(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A forward pre-hook: noise on the first argument."""
        if not self.active:
            return arguments
        x, *others = arguments
        return (self.perturb(x), *others)

    @untraced
    def after(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook: noise on the output."""
        return self.perturb(output) if self.active else output

    @property
    def active(self) -> bool:
        """Whether noise is drawn in the present mode."""
        return self.on_train if self.training else self.on_predict

    def drawn(self, like: Tensor, sample: Sampler, *, shared: bool = False) -> Tensor:
        """Noise in the shape of `like`, constant in gradients.

        Where the layer is held, it is the same for every image and every pass; `shared` says that
        `like` belongs to all images anyway.
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
        """Let the streams begin anew, from `seed`."""
        self.seed, self._generators = seed, {}

    def rng_state_dict(self) -> dict[str, Tensor]:
        """The state of each stream in use, by device."""
        return {key: generator.get_state() for key, generator in self._generators.items()}

    def load_rng_state_dict(self, states: Mapping[str, Tensor]) -> None:
        """Let the streams go on from `states`, which `rng_state_dict` has given."""
        # Those that are in no state had not begun yet.
        self._generators = {}
        for device, state in states.items():
            self.generator(torch.device(device)).set_state(state)


def attach(model: nn.Module, layer: NoiseLayer, place: nn.Module | None = None) -> None:
    """Make `layer` a part of `model`, so that it moves, is saved and changes mode with it.

    `place` is the layer of the model whose activations it will act on, if that is not the model.
    """
    layer.train(model.training)
    layer.place = next((path for path, module in model.named_modules() if module is place), "")
    names = (f"noise_{number}" for number in count())
    model.add_module(next(name for name in names if not hasattr(model, name)), layer)


def _memory(like: Tensor) -> Tensor:
    # Filled in the same order whatever the layout of `like`, and faster than channels_last; a
    # uniform number in bf16, from which other noise is made, has no tails.
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def standard_normal(memory: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, 1)."""
    return memory.normal_(generator=generator)


def standard_laplace(memory: Tensor, generator: torch.Generator) -> Tensor:
    """Laplace noise of scale 1, whose absolute value is exponential, from uniform numbers.

    On the CPU that takes a fraction of the time of `exponential_`.
    """
    memory.uniform_(-1, 1, generator=generator)
    # The rounded draw may be -1 itself, whose logarithm is infinite.
    sizes = memory.abs().clamp_max_(1 - torch.finfo(memory.dtype).eps).neg_().log1p_().neg_()
    return torch.copysign(sizes, memory, out=memory)


def noise_layers(model: nn.Module) -> list[NoiseLayer]:
    """All noise layers of `model`."""
    return [module for module in model.modules() if isinstance(module, NoiseLayer)]


def predicts_randomly(model: nn.Module) -> bool:
    """Whether the predictions of `model` depend on noise that is drawn in eval mode."""
    return any(layer.on_predict and layer.held is None for layer in noise_layers(model))


def penalty(model: nn.Module, progress: Progress) -> Tensor | None:
    """What the mechanisms of `model` add to the loss, a scalar; None where none does."""
    found = [layer.penalty(progress) for layer in noise_layers(model) if layer.on_train]
    terms = [term for term in found if term is not None]
    return torch.stack(terms).sum() if terms else None
