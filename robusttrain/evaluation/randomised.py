"""Models that draw noise when they predict."""

import math

import torch
from torch import Tensor, nn


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
