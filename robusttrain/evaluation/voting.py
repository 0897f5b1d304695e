"""Models that draw noise when they predict."""

import math

import torch
from torch import Tensor, nn

from robusttrain.attacks.model_view import logits_of, predictions
from robusttrain.evaluation.randomness import repeated
from robusttrain.noise.layer import Vote, noise_layers, predicts_randomly


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
        passes = torch.stack([logits_of(self.model, x).log_softmax(1) for _ in range(self.draws)])
        return passes.logsumexp(0) - math.log(self.draws)


class MajorityVote(nn.Module):
    """Shares of the draws that each class wins (PREDICT, Cohen et al. 2019).

    Parameters
    ----------
    model
        The model with its noise.
    draws
        Passes that vote.
    alpha
        If given, an image whose two best classes could be tied, by a two-sided binomial test at
        this level, gets no prediction: its shares are not numbers.
    """

    def __init__(self, model: nn.Module, draws: int, alpha: float | None = None) -> None:
        super().__init__()
        self.model, self.draws, self.alpha = model, draws, alpha
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """Shares (N, K)."""
        logits = [self.model(x) for _ in range(self.draws)]
        chosen = torch.stack([predictions(drawn) for drawn in logits])
        # Class -1 marks non-finite logits; drop its votes.
        votes = nn.functional.one_hot(chosen + 1, logits[0].shape[1] + 1).sum(0)[:, 1:]
        without = votes.sum(1, keepdim=True) == 0
        shares = (votes / self.draws).masked_fill(without, torch.nan)
        if self.alpha is None:
            return shares
        # Imported here, since few runs need it and it takes a second.
        from scipy.stats import binomtest

        first, second = votes.topk(2, dim=1).values.unbind(1)
        pairs = zip(first.tolist(), second.tolist(), strict=True)
        unsure = [binomtest(a, max(1, a + b)).pvalue > self.alpha for a, b in pairs]
        return shares.masked_fill(torch.tensor(unsure, device=x.device)[:, None], torch.nan)


def prediction(model: nn.Module, draws: int) -> nn.Module:
    """The classifier that a random model is, by the rule that its noise declares."""
    layers = [layer for layer in noise_layers(model) if layer.on_predict]
    if not any(layer.vote is Vote.majority for layer in layers):
        return MeanPrediction(model, draws)
    return MajorityVote(model, draws, _level(model))


def least_votes(model: nn.Module) -> int:
    """How many draws it takes until an image on which all agree is not abstained from."""
    alpha = _level(model)
    return 1 if alpha is None else votes_to_decide(alpha)


def votes_to_decide(alpha: float) -> int:
    """How many votes for one class and none for another a `MajorityVote` at this level believes."""
    # A two-sided test of n votes that agree has p = 2 / 2^n.
    return math.ceil(1 - math.log2(alpha))


def _level(model: nn.Module) -> float | None:
    """The level of the test that the noise of `model` wants of a vote, if any."""
    layers = [layer for layer in noise_layers(model) if layer.on_predict]
    return min((layer.alpha for layer in layers if layer.alpha is not None), default=None)


@torch.no_grad()
def classes_and_randomness(model: nn.Module, x: Tensor) -> tuple[int, bool]:
    """How many logits `model` returns, and whether they depend on noise.

    They do where a noise layer declares it, or where passes over the images `x`, or over perturbed
    ones, differ by more than rounding (`repeated`).
    """
    if predicts_randomly(model):
        return model(x[:1]).shape[1], True
    outputs, difference = repeated(model, x)
    return outputs.shape[1], difference > 0
