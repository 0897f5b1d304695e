"""Training on the same draws of noise that the attack has seen (SmoothAdv, Salman et al. 2019)."""

import math

import torch
from torch import Tensor, nn

from robusttrain.noise.control import drawing_from
from robusttrain.noise.layer import noise_layers


class SameDraws(nn.Module):
    """A view of a model that gives each image of a batch the same draws of noise in every pass.

    While its parameters are held still, that is, for an attack, it is the smoothed classifier: log
    of the mean softmax over the draws, (N, K). In training it returns the logits of all draws, (N *
    draws, K), those of an image one after the other, of which Salman et al. 2019 average the loss.

    Draws go by place in the batch: an attack that drops images on the way (restarts, `keep_best`,
    `stop_early`) shows others to those that remain.

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
        """Other draws from now on."""
        high = torch.iinfo(torch.int64).max
        self.seed = int(torch.randint(high, (1,), generator=generator, device=generator.device))

    def forward(self, x: Tensor) -> Tensor:
        """Logits or log-probabilities of images (N, C, H, W)."""
        with drawing_from(self.model, self.seed):
            logits: Tensor = self.model(x.repeat_interleave(self.draws, 0))
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            return logits
        shares = logits.log_softmax(1).view(len(x), self.draws, -1)
        return shares.logsumexp(1) - math.log(self.draws)


def wanted_draws(model: nn.Module) -> int | None:
    """The draws that the noise of `model` asks for in training, if any."""
    layers = [layer for layer in noise_layers(model) if layer.on_train]
    return max((layer.draws for layer in layers if layer.draws), default=None)
