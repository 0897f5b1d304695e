"""Training with the same draws of noise as the attack (SmoothAdv, Salman et al. 2019)."""

import math

import torch
from torch import Tensor, nn

from robusttrain.noise.control import drawing_from
from robusttrain.noise.layer import noise_layers


class SameDraws(nn.Module):
    """A wrapper of a model that gives each image of a batch the same draws of noise in every pass.

    While its parameters are frozen, as they are for an attack, it is the smoothed classifier and
    returns the log of the mean softmax over the draws, (N, K). In training it returns the logits of
    all draws, (N * draws, K), those of one image next to each other. Salman et al. 2019 average the
    loss over them.

    The draws depend on the position in the batch. If an attack drops images (restarts, `keep_best`,
    `stop_early`), the remaining images get other draws.

    Parameters
    ----------
    model
        The model with its noise.
    draws
        Draws for each image, 1 or more.
    """

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__()
        self.model, self.draws = model, draws
        self.training = model.training
        self.seed = 0

    def renew(self, generator: torch.Generator) -> None:
        """Use new draws from now on."""
        high = torch.iinfo(torch.int64).max
        self.seed = int(torch.randint(high, (1,), generator=generator, device=generator.device))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N * draws, K), or log-probabilities (N, K), of images (N, C, H, W)."""
        with drawing_from(self.model, self.seed):
            logits: Tensor = self.model(x.repeat_interleave(self.draws, 0))
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            return logits
        shares = logits.log_softmax(1).view(len(x), self.draws, -1)
        return shares.logsumexp(1) - math.log(self.draws)


def wanted_draws(model: nn.Module) -> int | None:
    """The number of draws that the noise of `model` needs in training, if any."""
    layers = [layer for layer in noise_layers(model) if layer.on_train]
    return max((layer.draws for layer in layers if layer.draws), default=None)
