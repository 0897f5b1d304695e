"""Contexts that control noise: drawn from a seed, switched off, held fixed, or always on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from robusttrain.noise.layer import Vote, noise_layers
from robusttrain.seeding import derived_seed


@contextmanager
def drawing_from(model: nn.Module, seed: int) -> Iterator[None]:
    """Let the noise layers of `model` draw from streams of `seed` in this block.

    Their own streams continue after the block, so that an evaluation does not change the training.
    """
    layers = noise_layers(model)
    before = [(layer.seed, layer._generators) for layer in layers]
    for number, layer in enumerate(layers):
        layer.seed, layer._generators = derived_seed(seed, f"layer {number}"), {}
    try:
        yield
    finally:
        for layer, (own_seed, generators) in zip(layers, before, strict=True):
            layer.seed, layer._generators = own_seed, generators


@contextmanager
def noise_off(model: nn.Module) -> Iterator[None]:
    """Switch off the noise of `model` in eval mode, in this block."""
    with _each_layer(model, "on_predict", lambda number: False):
        yield


@contextmanager
def smoothed(model: nn.Module) -> Iterator[None]:
    """Switch on the noise of `model` in eval mode, with a majority vote, in this block."""
    always = _each_layer(model, "on_predict", lambda number: True)
    with always, _each_layer(model, "vote", lambda number: Vote.majority):
        yield


@contextmanager
def noise_held(model: nn.Module, seed: int) -> Iterator[None]:
    """Fix the noise of `model` to one draw, the same for all images and passes, in this block."""
    with _each_layer(model, "held", lambda number: derived_seed(seed, f"held {number}")):
        yield


def unreached(model: nn.Module, look: Callable[[], object]) -> list[str]:
    """The places of the noise layers of `model` that draw nothing during `look`, an eval pass.

    A place is the path of a layer or a tensor; the empty path is the input.
    """
    layers = noise_layers(model)
    if not layers:
        return []
    with drawing_from(model, 0), _each_layer(model, "on_predict", lambda number: True):
        look()
        return [layer.place for layer in layers if not layer._generators]


@contextmanager
def _each_layer(model: nn.Module, attribute: str, value: Callable[[int], object]) -> Iterator[None]:
    layers = noise_layers(model)
    before = [getattr(layer, attribute) for layer in layers]
    try:
        for number, layer in enumerate(layers):
            setattr(layer, attribute, value(number))
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            setattr(layer, attribute, own)
