"""Models that draw noise when they predict."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robusttrain.noise import noise_layers, predicts_randomly


class MeanPrediction(nn.Module):
    """log of the mean softmax over `draws` passes through `model`, each with noise of its own.

    As the view of an attack this is expectation over transformation (Athalye et al. 2018); as the
    prediction it is the vote of the randomised classifier, on draws that no attack has seen.
    """

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__()
        self.model, self.draws = model, draws
        # A new module starts in train mode; this one only looks at a model that predicts.
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities (N, K)."""
        passes = torch.stack([self.model(x).log_softmax(1) for _ in range(self.draws)])
        return passes.logsumexp(0) - math.log(self.draws)


@torch.no_grad()
def classes_and_randomness(model: nn.Module, x: Tensor) -> tuple[int, bool]:
    """How many logits `model` returns, and whether they hang on noise.

    They do where a noise layer declares it, or where two passes over the images `x` differ.
    """
    first, second = model(x), model(x)
    # The tolerance is for devices that add in another order every time.
    differ = not torch.allclose(first, second, rtol=1e-3, atol=1e-5, equal_nan=True)
    return first.shape[1], predicts_randomly(model) or differ


@contextmanager
def noise_off(model: nn.Module) -> Iterator[None]:
    """Let the noise layers of `model` draw nothing when it predicts, in this block."""
    layers = [(layer, layer.on_predict) for layer in noise_layers(model)]
    try:
        for layer, _ in layers:
            layer.on_predict = False
        yield
    finally:
        for layer, on_predict in layers:
            layer.on_predict = on_predict
