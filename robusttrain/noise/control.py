"""Noise under control: drawn from a seed, off, held, or always on, for the length of a block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from robusttrain.noise.layer import Vote, noise_layers
from robusttrain.seeding import derived_seed


@contextmanager
def drawing_from(model: nn.Module, seed: int) -> Iterator[None]:
    """Let the noise layers of `model` draw from streams of `seed` for the length of the block.

    Afterwards they go on where they were: who looks at a model does not change its training.
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
    """Let the noise layers of `model` draw nothing when it predicts, in this block."""
    with _each_layer(model, "on_predict", lambda number: False):
        yield


@contextmanager
def smoothed(model: nn.Module) -> Iterator[None]:
    """Let `model` predict by the majority of its draws in this block, whatever it was told."""
    always = _each_layer(model, "on_predict", lambda number: True)
    with always, _each_layer(model, "vote", lambda number: Vote.majority):
        yield


@contextmanager
def noise_held(model: nn.Module, seed: int) -> Iterator[None]:
    """Let the noise of `model` be one draw, the same for every image and pass, in this block."""
    with _each_layer(model, "held", lambda number: derived_seed(seed, f"held {number}")):
        yield


def unreached(model: nn.Module, look: Callable[[], object]) -> list[str]:
    """Where the noise layers of `model` are that `look`, a pass in eval mode, gets no draw from.

    Their places are paths of layers and tensors; an empty one is that of the images.
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
